"""The tokenizer of the paper in pure torch: reads no data set, prints nothing.

Read ``v2flow.py`` first. ``assembly.py`` builds its parts. Their order: ``preprocess``, ``latents``
(with ``autoencoder``), ``resampler_grid``, ``quantizer_ema``, ``masking``, ``context``, ``flow``, ``guidance``,
``decoder_masked`` and ``decoder``. FlexTok's parts replace three of them: ``resampler_registers`` with ``prefix``,
``quantizer_fsq`` and ``decoder_transformer``.

The names below are imported at their first use (PEP 562): transformers imports the config early and alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from v2flow_cli.tokenizer.config import V2FlowConfig
    from v2flow_cli.tokenizer.image_processor import V2FlowImageProcessor
    from v2flow_cli.tokenizer.v2flow import V2FlowTokenizer

__all__ = ["V2FlowConfig", "V2FlowImageProcessor", "V2FlowTokenizer"]


_MODULES = {"V2FlowConfig": "config", "V2FlowImageProcessor": "image_processor", "V2FlowTokenizer": "v2flow"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
