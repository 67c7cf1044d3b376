"""The ``config.json`` of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.configuration_utils import PretrainedConfig

from v2flow_cli.errors import ModelError, RecipeError
from v2flow_cli.recipe.load import parse_section
from v2flow_cli.tokenizer.other_decoders import FAITHFUL


class V2FlowConfig(PretrainedConfig):
    """The recipe's model sections, the autoencoder's own config, and the shape of the frozen vocabulary.

    ``decoders`` are further decoders of the same ids (see ``other_decoders``); ``default_decoder`` is the one that
    is used unless the caller names another. ``refine_steps`` are those of ``encode`` for a given number of tokens,
    unless the caller names others. ``shared_autoencoder``, if it is there, is explained in ``embedded``.
    """

    model_type = "v2flow"

    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 2,
        autoencoder: dict[str, Any] | None = None,
        vocab_shape: Sequence[int] = (0, 0),
        vocabulary: dict[str, Any] | None = None,
        resampler: dict[str, Any] | None = None,
        quantizer: dict[str, Any] | None = None,
        context: dict[str, Any] | None = None,
        flow: dict[str, Any] | None = None,
        sampling: dict[str, Any] | None = None,
        pixel_decoder: bool = False,
        refine_steps: int = 0,
        decoders: dict[str, dict[str, Any]] | None = None,
        default_decoder: str = FAITHFUL,
        **kwargs: Any,
    ) -> None:
        self.image_size = image_size
        self.patch_size = patch_size
        self.autoencoder = autoencoder
        self.vocab_shape = list(vocab_shape)
        self.vocabulary = vocabulary
        self.resampler = resampler
        self.quantizer = quantizer
        self.context = context
        self.flow = flow
        self.sampling = sampling
        self.pixel_decoder = pixel_decoder
        self.refine_steps = refine_steps
        self.decoders = decoders
        self.default_decoder = default_decoder
        super().__init__(**kwargs)

    @property
    def codebook_size(self) -> int:
        return int(self.section("quantizer").codebook_size)

    def section(self, name: str) -> Any:
        """The dataclass of one section. Raises: ModelError if its keys are not the schema's."""
        try:
            return parse_section(name, getattr(self, name), "config.json")
        except RecipeError as error:
            raise ModelError(f"The model does not fit this version of v2flow: {error}") from None
