"""Registers v2flow with transformers' Auto classes when ``v2flow_cli`` is imported, without importing torch.

``AutoModel.register`` needs our classes, and those need torch, whose import takes seconds.
An import hook therefore registers them when a program imports the module of an Auto class.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def _register_config(module: Any) -> None:
    # transformers imports this module in the middle of modeling_utils: the model cannot be imported yet.
    from v2flow_cli.tokenizer import V2FlowConfig

    module.AutoConfig.register(V2FlowConfig.model_type, V2FlowConfig, exist_ok=True)


def _register_model(module: Any) -> None:
    from v2flow_cli.tokenizer import V2FlowConfig, V2FlowTokenizer

    module.AutoModel.register(V2FlowConfig, V2FlowTokenizer, exist_ok=True)


def _register_processor(module: Any) -> None:
    from v2flow_cli.tokenizer import V2FlowConfig, V2FlowImageProcessor

    backends = dict.fromkeys(("pil", "torchvision"), V2FlowImageProcessor)
    module.AutoImageProcessor.register(V2FlowConfig, image_processor_classes=backends, exist_ok=True)


_REGISTER = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
    "transformers.models.auto.image_processing_auto": _register_processor,
}


class _Hook:
    """A finder of ``sys.meta_path`` that registers v2flow after the modules in ``_REGISTER``."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in _REGISTER else None
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _REGISTER[name](module)

        loader.exec_module = exec_module
        return spec


def install() -> None:
    """Register with the Auto classes that are imported already, and with others when they are imported."""
    sys.meta_path.insert(0, _Hook())  # type: ignore[arg-type]  # typeshed requires a subclass; Python does not
    for name, register in _REGISTER.items():
        if name in sys.modules:
            register(sys.modules[name])
