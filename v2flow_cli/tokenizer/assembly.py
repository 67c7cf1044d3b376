"""The tokenizer's parts, built from its config, with its decoders, sizes, digests and model folders.

``v2flow.py`` adds the computation: encode, decode and the training pass.
"""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PretrainedConfig
from typing_extensions import Self

from v2flow_cli.errors import ModelError, foreign_errors
from v2flow_cli.recipe.schema import FlowTransformer
from v2flow_cli.runtime.digest import model_digest
from v2flow_cli.tokenizer.config import V2FlowConfig
from v2flow_cli.tokenizer.context import MaskedTransformer
from v2flow_cli.tokenizer.decoder import Decoder
from v2flow_cli.tokenizer.decoder_masked import MaskedDecoder
from v2flow_cli.tokenizer.decoder_transformer import VelocityTransformer
from v2flow_cli.tokenizer.embedded import AUTOENCODER, SHARED, autoencoder_weights, tokenizer_folder
from v2flow_cli.tokenizer.flow import VelocityNetwork
from v2flow_cli.tokenizer.latents import Latents
from v2flow_cli.tokenizer.other_decoders import (
    DECODER,
    DECODER_SECTIONS,
    FAITHFUL,
    PIXEL_DECODER,
    SHA256,
    copy_decoders,
    decoder_file,
    load_decoder,
    settings_of,
)
from v2flow_cli.tokenizer.preprocess import fitted_size
from v2flow_cli.tokenizer.pretrained import PretrainedModule
from v2flow_cli.tokenizer.quantizer import TokenQuantizer
from v2flow_cli.tokenizer.quantizer_ema import EMAQuantizer
from v2flow_cli.tokenizer.quantizer_fsq import FSQQuantizer
from v2flow_cli.tokenizer.resampler import TokenResampler
from v2flow_cli.tokenizer.resampler_grid import REFERENCE_PX, GridResampler
from v2flow_cli.tokenizer.resampler_registers import RegisterResampler
from v2flow_cli.tokenizer.vocabulary import VocabularyProjection

if TYPE_CHECKING:
    from v2flow_cli.tokenizer.image_processor import V2FlowImageProcessor

SECTIONS = ("vocabulary", "resampler", "quantizer", "context", "flow", "sampling")  # of the recipe

# By the `kind` of their section in the recipe.
RESAMPLERS: dict[str, Callable[..., TokenResampler]] = {"grid": GridResampler, "registers": RegisterResampler}
QUANTIZERS: dict[str, Callable[..., TokenQuantizer]] = {"ema": EMAQuantizer, "fsq": FSQQuantizer}


class TokenizerAssembly(PretrainedModule):
    """The parts of a tokenizer as its config describes them."""

    config_class = V2FlowConfig
    config: V2FlowConfig

    def __init__(self, config: V2FlowConfig) -> None:
        super().__init__(config)
        for key, least in (("image_size", 1), ("refine_steps", 0)):
            value = getattr(config, key)
            if not isinstance(value, int) or value < least:
                raise ModelError(f"{key} of the config is {value!r}; expected a whole number from {least} on.")
        vocabulary, quantizer = config.section("vocabulary"), config.section("quantizer")
        self.latents = Latents(config.autoencoder or {})
        self.patch_size = config.patch_size
        resampler = config.section("resampler")
        build = RESAMPLERS[resampler.kind]
        self.resampler: TokenResampler = build(resampler, self.latents.channels, self.latents.downsampling)
        hidden_size = resampler.hidden_size
        vocab_size, code_size = config.vocab_shape
        self.vocabulary: VocabularyProjection | None = None
        if vocabulary.llm != "none":
            self.vocabulary = VocabularyProjection(vocabulary, hidden_size, vocab_size, code_size)
        else:  # the ablation without a vocabulary: a linear map to the code width
            code_size = quantizer.code_size
            self.to_code = nn.Linear(hidden_size, code_size)
        self.quantizer = QUANTIZERS[quantizer.kind](quantizer, code_size)
        self._code_size = code_size
        self._build_decoder()
        self.decoder_name = FAITHFUL
        self._decoder_files: dict[str, Path | None] = {}  # of the other decoders
        self._decoders: dict[str, Self] = {}  # this tokenizer with each decoder that was used

    @functools.cached_property
    def image_processor(self) -> V2FlowImageProcessor:
        """The preprocessing of its images, as a transformers image processor."""
        from v2flow_cli.tokenizer.image_processor import V2FlowImageProcessor

        return V2FlowImageProcessor(size=self.config.image_size)

    # -- decoders ------------------------------------------------------------------------------------------

    def _build_decoder(self) -> None:
        context, flow = self.config.section("context"), self.config.section("flow")
        patch_numbers = self.latents.channels * self.patch_size**2
        ordered = self.resampler.ordered
        if isinstance(flow, FlowTransformer):
            self.flow: VelocityTransformer | VelocityNetwork = VelocityTransformer(
                flow, self._code_size, patch_numbers, ordered
            )
            decoder: Decoder = self.flow
        else:
            rows, columns = self._patch_grid(REFERENCE_PX, REFERENCE_PX)
            other_parts = [rows * columns // length for length in self.resampler.lengths[1:]]  # patches a token
            self.context = MaskedTransformer(context, self._code_size, patch_numbers, ordered, other_parts)
            self.flow = VelocityNetwork(flow, context.hidden_size, patch_numbers)
            decoder = MaskedDecoder(self.context, self.flow, context, flow)
        # In a tuple, so that its parameters have one name each: those of ``context`` and ``flow``.
        self._decoder = (decoder,)
        self.pixel_decoder = self.latents.copy_decoder() if self.config.pixel_decoder else None

    @property
    def decoder(self) -> Decoder:
        """The decoder that the recipe chose."""
        return self._decoder[0]

    @property
    def decoder_names(self) -> tuple[str, ...]:
        """The decoders that its ids can be decoded with; the first one is ``faithful``."""
        return (FAITHFUL, *(self.config.decoders or {}))

    def with_decoder(self, name: str | None = None) -> Self:
        """This tokenizer with its decoder ``name`` (None: the model's default) and that decoder's sampling.

        All other parts are shared with this one, not copied, and both give the same ids.
        Raises:  ModelError for a decoder that it does not have, or whose file cannot be used.
        """
        name = name or self.config.default_decoder
        if name == self.decoder_name:
            return self
        source = self.config.name_or_path or "this tokenizer"
        if name not in self.decoder_names:
            raise ModelError(f"{source}: no decoder {name!r}; it has {' and '.join(self.decoder_names)}.")
        self._decoders.setdefault(self.decoder_name, self)
        if name not in self._decoders:
            settings = settings_of(self.config.decoders, name, source)
            self._decoders[name] = self._copy_with_decoder(name, settings, source)
        return self._decoders[name].to(self.device)

    def _copy_with_decoder(self, name: str, settings: dict[str, Any], source: str) -> Self:
        """A copy that shares all modules but the decoder's, which are built from ``settings`` and its file."""
        other = copy.copy(self)
        other._modules = {key: part for key, part in self._modules.items() if key not in DECODER}
        other.config, other.decoder_name = copy.deepcopy(self.config), name
        for section in DECODER_SECTIONS:
            setattr(other.config, section, settings[section])
        other.config.pixel_decoder = settings.get(PIXEL_DECODER, False)
        with torch.random.fork_rng(devices=[]):  # for the initial values, which the file's replace
            other._build_decoder()
        parts = {part: getattr(other, part).to(self.dtype) for part in DECODER if part in other._modules}
        load_decoder(parts, self._decoder_files.get(name), settings[SHA256], name, source)
        return other.train(self.training)

    # -- sizes ---------------------------------------------------------------------------------------------

    @property
    def size_multiple(self) -> int:
        """Image sides must be a multiple of this many pixels."""
        return math.lcm(self.latents.downsampling * self.patch_size, self.resampler.size_multiple)

    def num_tokens(self, height: int, width: int) -> int:
        """Tokens of an image of ``height`` x ``width`` pixels; the maximum if the length is flexible.

        Raises:  ValueError if the sides do not fit.
        """
        if height < 1 or width < 1 or height % self.size_multiple or width % self.size_multiple:
            raise ValueError(
                f"an image of {height} x {width} pixels does not fit; sides must be multiples of {self.size_multiple}"
            )
        return self.resampler.num_tokens(height, width)

    def fitted_size(self, width: int, height: int, side: int | None = None) -> tuple[int, int]:
        """(height, width) nearest to the shape of a ``width`` x ``height`` image that ``encode`` and ``decode`` take.

        Its area is near ``side`` squared (default: the config's size).
        """
        return fitted_size(width, height, side or self.config.image_size, self.size_multiple)

    @property
    def flexible(self) -> bool:
        """True if every prefix of an image's tokens decodes; False if an image has exactly ``num_tokens``."""
        return self.resampler.flexible

    def lengths(self, height: int, width: int) -> tuple[int, ...]:
        """The numbers of tokens that an image of ``height`` x ``width`` pixels can have, the default first.

        A tokenizer of flexible length takes 1 to this one number. Raises: ValueError as ``num_tokens``.
        """
        default = self.num_tokens(height, width)
        others = self.resampler.rates(height, width)[1:]
        return (default, *(self.resampler.num_tokens(height, width, rate) for rate in others))

    @property
    def max_tokens(self) -> int:
        """Tokens of an image of the config's size; a flexible tokenizer takes 1 to this many, at any size."""
        return self.num_tokens(self.config.image_size, self.config.image_size)

    def grid_of(self, num_tokens: int) -> tuple[int, int]:
        """(height, width) in pixels of the square image that has ``num_tokens`` tokens; ValueError if none has.

        It is an image of the config's size if that can have so many, else one of another size at the first rate. An
        ordered sequence does not determine the size: it is the config's.
        """
        size = self.config.image_size
        side = self.resampler.square_side(num_tokens, size, self.size_multiple)
        if side is None:
            raise ValueError(f"no square image has {num_tokens} tokens; at {size} px it is {self.max_tokens}")
        self.check_length(num_tokens, side, side)
        return side, side

    def check_length(self, length: int, height: int, width: int) -> None:
        """Raises: ValueError if an image of ``height`` x ``width`` pixels cannot be decoded from ``length`` tokens."""
        lengths = self.lengths(height, width)
        if self.flexible and not 1 <= length <= lengths[0]:
            raise ValueError(f"{length} tokens; this tokenizer takes 1 to {lengths[0]}")
        if not self.flexible and length not in lengths:
            raise ValueError(f"{length} tokens, but {height} x {width} pixels take {' or '.join(map(str, lengths))}")

    def _patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of patches of an image of ``height`` x ``width`` pixels."""
        side = self.latents.downsampling * self.patch_size
        return height // side, width // side

    # -- digests -------------------------------------------------------------------------------------------

    @property
    def digest(self) -> str:
        """16 hex digits over all weights and all settings except those of the sampling.

        Computed at each access, about 0.2 s for each 100 MB of float32: read it once, not in a loop.
        """
        return self._digest_without(())

    @property
    def token_digest(self) -> str:
        """16 hex digits over what determines ids and their meaning; token files and LLMs carry it.

        The decoder is not part of it: a decoder that is trained further reads the same tokens. Computed at each access,
        as ``digest``.
        """
        return self._digest_without(DECODER)

    def _digest_without(self, parts: tuple[str, ...]) -> str:
        sections = (name for name in SECTIONS if name not in ("sampling", *parts))
        model = {name: getattr(self.config, name) for name in (*sections, "autoencoder", "patch_size")}
        weights = {k: v for k, v in self.state_dict().items() if k.split(".")[0] not in parts}
        return model_digest(json.dumps(model, sort_keys=True, default=list), weights)

    @property
    def codebook(self) -> Tensor:
        """The codes (K, D) in the embedding space of the LLM whose vocabulary was used (float32)."""
        codes = self.quantizer.vectors.float()
        return codes if self.vocabulary is None else self.vocabulary.codebook_to_llm(codes)

    # -- folders -------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[override]  # it takes a hub id and the hub's options too
        cls,
        path_or_id: str | Path | None = None,
        *,
        decoder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> Self:
        """The tokenizer in a folder or on the hub, in eval mode; without an argument the embedded one.

        Args:    path_or_id, also ``default`` or ``flexible``, the embedded tokenizers;
                 decoder, one of its ``decoder_names`` (default: the model's default);
                 revision, token, cache_dir, local_files_only: of a hub id, as ``runtime.hub.model_folder`` takes them;
                 kwargs, as PretrainedModule.from_pretrained takes them: dtype (default: float32), config.
        Raises:  ModelError for anything that is not a complete v2flow tokenizer, and a decoder that it does not have.
        """
        folder = tokenizer_folder(
            path_or_id, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        source = folder if path_or_id is None else path_or_id
        with foreign_errors(f"{source}: not a loadable v2flow tokenizer"):
            config, _ = V2FlowConfig.get_config_dict(folder)
            if config.get("model_type") != V2FlowConfig.model_type:
                kind = f"a model of type {config['model_type']!r}" if "model_type" in config else "no model"
                raise ModelError(f"{source}: {kind}; expected a v2flow tokenizer (a folder written by `v2flow train`).")
            model = super().from_pretrained(folder, name=str(source), **kwargs)
        for name in model.config.decoders or {}:  # a missing file is an error only when its decoder is used
            file = folder / decoder_file(name)
            model._decoder_files[name] = file if file.is_file() else None
        return model.with_decoder(decoder)

    @classmethod
    def _load_weights(cls, folder: Path, config: PretrainedConfig) -> dict[str, Tensor]:
        """Those of the file; with a shared autoencoder its weights too, so that the model is complete from then on."""
        weights = super()._load_weights(folder, config)
        if hasattr(config, SHARED):
            shared = autoencoder_weights(folder, config.to_dict())
            weights |= {f"{AUTOENCODER}{name}": tensor for name, tensor in shared.items()}
            delattr(config, SHARED)
        return weights

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write ``config.json``, ``model.safetensors``, ``preprocessor_config.json``, and the other decoders' files."""
        if self.decoder_name != FAITHFUL:
            return self.with_decoder(FAITHFUL).save_pretrained(save_directory, **kwargs)
        super().save_pretrained(save_directory, **kwargs)

    def _write(self, folder: Path) -> None:
        super()._write(folder)
        self.image_processor.save_pretrained(folder)
        copy_decoders(self._decoder_files, folder)
