"""The tokenizer of the paper in pure torch: reads no data set, prints nothing.

Read ``v2flow.py`` first. ``assembly.py`` builds its parts. Their order: ``preprocess``, ``latents``
(with ``autoencoder``), ``resampler_grid``, ``quantizer_ema``, ``masking``, ``context``, ``flow``, ``guidance``,
``decoder_masked`` and ``decoder``. FlexTok's parts replace three of them: ``resampler_registers`` with ``prefix``,
``quantizer_fsq`` and ``decoder_transformer``.

The names below are imported at their first use (PEP 562): transformers imports the config early and alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from v2flow_cli.tokenizer.config import V2FlowConfig
    from v2flow_cli.tokenizer.image_processor import V2FlowImageProcessor
    from v2flow_cli.tokenizer.v2flow import V2FlowTokenizer

__all__ = ["V2FlowConfig", "V2FlowImageProcessor", "V2FlowTokenizer"]


def __getattr__(name: str) -> Any:
    if name == "V2FlowConfig":
        from v2flow_cli.tokenizer.config import V2FlowConfig

        return V2FlowConfig
    if name == "V2FlowImageProcessor":
        from v2flow_cli.tokenizer.image_processor import V2FlowImageProcessor

        return V2FlowImageProcessor
    if name == "V2FlowTokenizer":
        from v2flow_cli.tokenizer.v2flow import V2FlowTokenizer

        return V2FlowTokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
