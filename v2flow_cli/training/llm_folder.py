"""The folder of a trained language model, in the layout of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from v2flow_cli.llm.load import without_tied
from v2flow_cli.runtime.digest import weights_digest
from v2flow_cli.training.output import publishing_model


def save_folder(
    trainer: Trainer,
    model: PreTrainedModel,
    tokenizer: Any,
    output: str | Path,
    save_dtype: str,
    files: Mapping[str, str | bytes],
) -> None:
    """Write config, safetensors, text tokenizer and ``files`` to ``output``.

    ``model`` is the trainer's model, or the result of merging its adapters. Everything is written to a temporary folder
    in ``output`` first, so that an interrupted save leaves no incomplete file.
    Raises:  ModelError if it cannot be written.
    """
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped) if model is trainer.model else None
    if not trainer.is_world_process_zero():
        return
    dtype = torch.bfloat16 if save_dtype == "bf16" else torch.float32
    state_dict = {name: tensor.to(dtype) for name, tensor in (state_dict or model.state_dict()).items()}
    # Copies of a tied table are separate tensors, which save_pretrained would not recognise as tied.
    state_dict = without_tied(model, state_dict)
    model.to(dtype)  # save_pretrained writes the model's dtype into the config
    model.config.use_cache = True  # Trainer turns it off
    if hasattr(model.config, "v2flow"):
        model.config.v2flow["weights_digest"] = weights_digest(state_dict)
    with publishing_model(Path(output)) as partial:
        model.save_pretrained(partial, state_dict=state_dict)
        tokenizer.save_pretrained(partial)
        for name, content in files.items():
            (partial / name).write_bytes(content.encode() if isinstance(content, str) else content)
