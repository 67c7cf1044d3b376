"""Decoders of the same token ids beside the one in ``model.safetensors``: ``decoder-NAME.safetensors`` in the folder.

``config.json`` lists them under ``decoders``: for each name the ``DECODER_SECTIONS``, ``pixel_decoder`` and the SHA-256
of its file.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from v2flow_cli.errors import ModelError, reason_of

FAITHFUL = "faithful"  # the decoder in model.safetensors, and the only one of most models
DECODER = ("context", "flow", "pixel_decoder")  # parts of the model that only decoding uses; some models lack some
DECODER_SECTIONS = ("context", "flow", "sampling")  # of the config, that each decoder has of its own
PIXEL_DECODER = "pixel_decoder"  # in the config, that decoders of older folders lack
SHA256 = "sha256"


def decoder_file(name: str) -> str:
    """The file of the decoder ``name`` in a model folder."""
    return f"decoder-{name}.safetensors"


def settings_of(decoders: Mapping[str, Any] | None, name: str, source: str) -> dict[str, Any]:
    """The entry of the decoder ``name`` in ``config.json``.  Raises: ModelError if keys are missing."""
    settings = (decoders or {}).get(name)
    if not isinstance(settings, dict) or not {*DECODER_SECTIONS, SHA256} <= settings.keys():
        raise ModelError(
            f"{source}: config.json: decoders.{name} needs the keys {', '.join((*DECODER_SECTIONS, SHA256))}."
        )
    return settings


def load_decoder(parts: Mapping[str, nn.Module], file: Path | None, sha256: str, name: str, source: str) -> None:
    """Fill ``parts``, modules by their names, from ``file``; ``sha256`` is the config's.

    Raises:  ModelError for a file that is missing, damaged, of another model or of other shapes.
    """
    try:
        content = b"" if file is None else file.read_bytes()
    except OSError as error:
        raise ModelError(f"{file}: the decoder {name} cannot be read ({error.strerror}).") from None
    if not content:
        raise ModelError(f"{source}: {decoder_file(name)} is missing, so the decoder {name} cannot be used.")
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise ModelError(
            f"{file}: SHA-256 {digest[:12]}, but config.json expects {sha256[:12]}: damaged, or of another model. "
            "Copy the whole model folder again."
        )
    try:
        weights = load(content)
        for part, module in parts.items():
            prefix = f"{part}."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    except (SafetensorError, RuntimeError) as error:
        raise ModelError(
            f"{file}: the weights do not fit decoders.{name} of config.json ({reason_of(error)})."
        ) from None
    unexpected = sorted(key for key in weights if key.split(".")[0] not in parts)
    if unexpected:
        raise ModelError(f"{file}: unexpected weights of decoder {name}: {', '.join(unexpected[:3])}.")


def copy_decoders(files: Mapping[str, Path | None], folder: Path) -> None:
    """Copy the decoders' ``files`` to the model folder ``folder``; None: a file that was missing on loading."""
    for name, file in files.items():
        if file is not None:
            shutil.copyfile(file, folder / decoder_file(name))
