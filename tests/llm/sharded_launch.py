"""``v2flow`` under FSDP 2 or DeepSpeed on CPU processes: ``-m tests.llm.sharded_launch fsdp finetune-llm ...``.

accelerate uses these engines on GPUs only. Here its state is set to the engine after it has inspected the machine; the
engine, the collectives (gloo) and all code of v2flow then run unchanged.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

ENVIRONMENT = {
    "fsdp": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    },
    "deepspeed": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "DS_ACCELERATOR": "cpu",
    },
}


def choose_engine(engine: str) -> None:
    """Have accelerate take ``engine`` without a GPU; its settings (stage, kind of checkpoint) are the environment's."""
    os.environ.update(ENVIRONMENT[engine], ACCELERATE_USE_CPU="true")
    look_at_machine, chosen = AcceleratorState.__init__, {}

    def init(self: AcceleratorState, *args: Any, **plugins: Any) -> None:
        look_at_machine(self, *args, **plugins)
        if plugin := plugins.get(f"{engine}_plugin"):
            chosen["plugin"] = plugin
            if engine == "deepspeed":
                plugin.set_mixed_precision("no")
                plugin.select(_from_accelerator_state=True)
        if chosen and engine == "fsdp":
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, chosen["plugin"]
        elif chosen:
            self.distributed_type, self.deepspeed_plugins = DistributedType.DEEPSPEED, chosen["plugin"]

    AcceleratorState.__init__ = init  # type: ignore[method-assign]


if __name__ == "__main__":
    choose_engine(sys.argv.pop(1))
    from v2flow_cli.cli.app import main

    main()
