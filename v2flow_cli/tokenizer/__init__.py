"""The tokenizer of the paper in pure torch: reads no data set, prints nothing.

Read ``v2flow.py`` first: it assembles, in this order, ``preprocess``, ``latents`` (with ``autoencoder``),
``resampler_grid``, ``quantizer_ema``, ``masking``, ``context``, ``flow``, ``guidance``, ``decoder_masked`` and
``decoder``. FlexTok's parts replace three of them: ``resampler_registers`` with ``prefix``, ``quantizer_fsq`` and
``decoder_transformer``.
"""

from v2flow_cli.tokenizer.preprocess import V2FlowImageProcessor
from v2flow_cli.tokenizer.v2flow import V2FlowConfig, V2FlowTokenizer

__all__ = ["V2FlowConfig", "V2FlowImageProcessor", "V2FlowTokenizer"]
