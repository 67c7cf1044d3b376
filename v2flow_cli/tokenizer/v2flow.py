"""The V2Flow tokenizer: images -> token ids -> images. Assembles the parts of this room."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn

from v2flow_cli.errors import ModelError, reason_of
from v2flow_cli.recipe.schema import Context, FlowTransformer, Sampling, TokenizerLoss
from v2flow_cli.runtime.batch_invariant import on_single_threads
from v2flow_cli.runtime.device import tf32, without_autocast
from v2flow_cli.runtime.digest import model_digest
from v2flow_cli.runtime.hub import model_folder
from v2flow_cli.tokenizer.config import V2FlowConfig
from v2flow_cli.tokenizer.context import MaskedTransformer, grid_coordinates
from v2flow_cli.tokenizer.decoder import Decoder, Drawn, Places, StepPlan, count_dropped
from v2flow_cli.tokenizer.decoder_masked import MaskedDecoder
from v2flow_cli.tokenizer.decoder_transformer import VelocityTransformer
from v2flow_cli.tokenizer.flow import VelocityNetwork
from v2flow_cli.tokenizer.latents import Latents
from v2flow_cli.tokenizer.masking import hidden_patches, mask_ratio
from v2flow_cli.tokenizer.other_decoders import (
    DECODER,
    FAITHFUL,
    KEPT,
    SHA256,
    copy_decoders,
    decoder_file,
    load_decoder,
    settings_of,
)
from v2flow_cli.tokenizer.preprocess import fitted_size
from v2flow_cli.tokenizer.pretrained import PretrainedModule
from v2flow_cli.tokenizer.quantizer_ema import EMAQuantizer
from v2flow_cli.tokenizer.quantizer_fsq import FSQQuantizer
from v2flow_cli.tokenizer.resampler import TokenResampler
from v2flow_cli.tokenizer.resampler_grid import REFERENCE_PX, GridResampler
from v2flow_cli.tokenizer.resampler_registers import RegisterResampler
from v2flow_cli.tokenizer.vocabulary import VocabularyProjection

if TYPE_CHECKING:
    from v2flow_cli.tokenizer.image_processor import V2FlowImageProcessor

EMBEDDED_MODEL = Path(__file__).resolve().parents[1] / "assets" / "default" / "tokenizer"
SECTIONS = ("vocabulary", "resampler", "quantizer", "context", "flow", "sampling")  # of the recipe


# By the `kind` of their section in the recipe.
RESAMPLERS: dict[str, Callable[..., TokenResampler]] = {"grid": GridResampler, "registers": RegisterResampler}
QUANTIZERS: dict[str, Callable[..., EMAQuantizer | FSQQuantizer]] = {"ema": EMAQuantizer, "fsq": FSQQuantizer}


@dataclass(frozen=True)
class V2FlowOutput:
    """Loss terms (scalars) and diagnostics of one training pass; the images that saw the dummy D come first."""

    flow_loss: Tensor
    regression_loss: Tensor
    commit_loss: Tensor
    batch_entropy: Tensor  # nats; 0 without a vocabulary
    word_entropy: Tensor  # nats
    token_ids: Tensor  # (B, n)
    latents: Tensor  # (B, C, h, w) predicted; visible patches unchanged


class V2FlowTokenizer(PretrainedModule):
    """Images to sequences of discrete tokens in an LLM's vocabulary space, and back.

    ``V2FlowTokenizer.from_pretrained()`` loads the embedded model; pass a folder or a hub id for another.
    """

    config_class = V2FlowConfig
    config: V2FlowConfig

    def __init__(self, config: V2FlowConfig) -> None:
        super().__init__(config)
        self.vocabulary_settings, quantizer = config.section("vocabulary"), config.section("quantizer")
        self.latents = Latents(config.autoencoder or {})
        self.patch_size = config.patch_size
        resampler = config.section("resampler")
        build = RESAMPLERS[resampler.kind]
        self.resampler: TokenResampler = build(resampler, self.latents.channels, self.latents.downsampling)
        hidden_size = resampler.hidden_size
        vocab_size, code_size = config.vocab_shape
        self.vocabulary: VocabularyProjection | None = None
        if self.vocabulary_settings.llm != "none":
            self.vocabulary = VocabularyProjection(self.vocabulary_settings, hidden_size, vocab_size, code_size)
        else:  # the ablation without a vocabulary: a linear map to the code width takes its place
            code_size = quantizer.code_size
            self.to_code = nn.Linear(hidden_size, code_size)
        self.quantizer = QUANTIZERS[quantizer.kind](quantizer, code_size)
        self._code_size = code_size
        self._build_decoder(code_size)
        self.decoder_name = FAITHFUL
        self._decoder_files: dict[str, Path | None] = {}  # of the other decoders
        self._decoders: dict[str, V2FlowTokenizer] = {}  # this tokenizer with each decoder that was asked for

    def _build_decoder(self, code_size: int) -> None:
        context, flow = self.config.section("context"), self.config.section("flow")
        patch_numbers = self.latents.channels * self.patch_size**2
        ordered = self.resampler.ordered
        if isinstance(flow, FlowTransformer):
            self.flow: VelocityTransformer | VelocityNetwork = VelocityTransformer(
                flow, code_size, patch_numbers, ordered
            )
            decoder: Decoder = self.flow
        else:
            self.context = MaskedTransformer(context, code_size, patch_numbers, ordered, self._other_parts())
            self.flow = VelocityNetwork(flow, context.hidden_size, patch_numbers)
            decoder = MaskedDecoder(self.context, self.flow, flow)
        # In a tuple, so that it is no second name for its parameters, which are ``context`` and ``flow``.
        self._decoder = (decoder,)

    def _other_parts(self) -> list[int]:
        """Patches a token at each of the resampler's rates but the first."""
        rows, columns = self._patch_grid(REFERENCE_PX, REFERENCE_PX)
        return [rows * columns // length for length in self.resampler.lengths[1:]]

    @property
    def decoder(self) -> Decoder:
        """The decoder that the recipe chose."""
        return self._decoder[0]

    @property
    def decoder_names(self) -> tuple[str, ...]:
        """The decoders that its ids can be decoded with; the first one is ``faithful``."""
        return (FAITHFUL, *(self.config.decoders or {}))

    def with_decoder(self, name: str | None = None) -> V2FlowTokenizer:
        """This tokenizer with its decoder ``name`` (None: the model's default) and that decoder's sampling.

        Everything else is shared with this one, not copied, and both give the same ids.
        Raises:  ModelError for a decoder that it does not have, or whose file cannot be used.
        """
        name = name or self.config.default_decoder
        if name == self.decoder_name:
            return self
        place = self.config.name_or_path or "this tokenizer"
        if name not in self.decoder_names:
            raise ModelError(f"{place}: no decoder {name!r}; it has {' and '.join(self.decoder_names)}.")
        self._decoders.setdefault(self.decoder_name, self)
        if name not in self._decoders:
            self._decoders[name] = self._copy_with_decoder(name, settings_of(self.config.decoders, name, place), place)
        return self._decoders[name].to(self.device)

    def _copy_with_decoder(self, name: str, settings: dict[str, Any], place: str) -> V2FlowTokenizer:
        """A copy that shares all modules but the decoder's, which are built from ``settings`` and its file."""
        other = copy.copy(self)
        other._modules = {key: part for key, part in self._modules.items() if key not in DECODER}
        other.config, other.decoder_name = copy.deepcopy(self.config), name
        for section in KEPT:
            setattr(other.config, section, settings[section])
        with torch.random.fork_rng(devices=[]):  # first values, which are replaced
            other._build_decoder(self._code_size)
        parts = {part: getattr(other, part).to(self.dtype) for part in DECODER if part in other._modules}
        load_decoder(parts, self._decoder_files.get(name), settings[SHA256], name, place)
        return other.train(self.training)

    @functools.cached_property
    def image_processor(self) -> V2FlowImageProcessor:
        """The preprocessing of its images, as transformers knows it."""
        from v2flow_cli.tokenizer.image_processor import V2FlowImageProcessor

        return V2FlowImageProcessor(size=self.config.image_size)

    # -- sizes ---------------------------------------------------------------------------------------------

    @property
    def size_multiple(self) -> int:
        """Image sides must be a multiple of this many pixels."""
        return math.lcm(self.latents.downsampling * self.patch_size, self.resampler.size_multiple)

    def num_tokens(self, height: int, width: int) -> int:
        """Tokens of an image of ``height`` x ``width`` pixels, the most where the length is flexible.

        Raises:  ValueError if the sides do not fit.
        """
        if height < 1 or width < 1 or height % self.size_multiple or width % self.size_multiple:
            raise ValueError(
                f"an image of {height} x {width} pixels does not fit; sides must be multiples of {self.size_multiple}"
            )
        return self.resampler.num_tokens(height, width)

    def fitted_size(self, width: int, height: int, side: int | None = None) -> tuple[int, int]:
        """(height, width) at which a picture of ``width`` x ``height`` pixels keeps its shape, but for a few pixels.

        Its area is near ``side`` squared (default: the config's size). ``encode`` and ``decode`` take images of it.
        """
        return fitted_size(width, height, side or self.config.image_size, self.size_multiple)

    @property
    def flexible(self) -> bool:
        """True if every prefix of an image's tokens decodes; False if an image has exactly ``num_tokens``."""
        return self.resampler.flexible

    def lengths(self, height: int, width: int) -> tuple[int, ...]:
        """The numbers of tokens that an image of ``height`` x ``width`` pixels can have, the default first.

        A tokenizer of flexible length has 1 to the one given here. Raises: ValueError as ``num_tokens``.
        """
        whole = self.num_tokens(height, width)
        others = self.resampler.rates(height, width)[1:]
        return (whole, *(self.resampler.num_tokens(height, width, rate) for rate in others))

    def _rate(self, length: int, height: int, width: int) -> int:
        """The resampler's rate at which an image of ``height`` x ``width`` pixels has ``length`` tokens."""
        if self.flexible:  # any length is a prefix
            return 0
        rates = self.resampler.rates(height, width)
        return next(rate for rate in rates if self.resampler.num_tokens(height, width, rate) == length)

    @property
    def max_tokens(self) -> int:
        """Tokens of an image of the config's size; a flexible tokenizer takes 1 to this many, at any size."""
        return self.num_tokens(self.config.image_size, self.config.image_size)

    def grid_of(self, num_tokens: int) -> tuple[int, int]:
        """(height, width) in pixels of the square image that has ``num_tokens`` tokens; ValueError if none has.

        An image of the config's size where it can have that many, else one of another size at the first rate. An
        ordered sequence says nothing of the size: it is the config's.
        """
        if self.resampler.ordered:
            size = self.config.image_size
            self.check_length(num_tokens, size, size)
            return size, size
        size = self.config.image_size
        if num_tokens in self.lengths(size, size):
            return size, size
        side = round(math.sqrt(num_tokens / self.num_tokens(256, 256)) * 256) if num_tokens > 0 else 0
        if side <= 0 or side % self.size_multiple or self.num_tokens(side, side) != num_tokens:
            raise ValueError(
                f"no square image has {num_tokens} tokens; at {self.config.image_size} px it is {self.max_tokens}"
            )
        return side, side

    def check_length(self, length: int, height: int, width: int) -> None:
        """Raises: ValueError if an image of ``height`` x ``width`` pixels cannot be decoded from ``length`` tokens."""
        whole = self.num_tokens(height, width)
        if self.flexible and not 1 <= length <= whole:
            raise ValueError(f"{length} tokens; this tokenizer takes 1 to {whole}")
        possible = self.lengths(height, width)
        if not self.flexible and length not in possible:
            raise ValueError(f"{length} tokens, but {height} x {width} pixels take {' or '.join(map(str, possible))}")

    @property
    def digest(self) -> str:
        """16 hex digits over all weights and settings but those of the sampling: two models with it are the same.

        Computed from the weights as they are now, some 0.2 s for each 100 MB of float32: keep it, do not ask in a loop.
        """
        return self._digest_without(())

    @property
    def token_digest(self) -> str:
        """16 hex digits over what determines ids and their meaning; token files and LLMs carry it.

        The decoder has no part in it: one that is trained further still reads the same tokens. Computed anew each time,
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

    # -- image -> token ids --------------------------------------------------------------------------------

    @torch.no_grad()
    @tf32(False)
    def encode(self, images: Tensor, num_tokens: int | None = None) -> Tensor:
        """Token ids (B, L) int64 of images (B, 3, H, W) in [-1, 1]; deterministic.

        ``num_tokens``: one of ``lengths``, or only the first so many, where the length is flexible.

        On a CPU each image has one thread to itself: an id on the border of two codes must not depend on the other
        images in the batch, nor on the number of threads.
        Raises:  ValueError for a size or a number of tokens that does not fit.
        """
        images = images.to(self.device, self.dtype)
        height, width = images.shape[-2:]
        whole = self.num_tokens(height, width)
        self.check_length(whole if num_tokens is None else num_tokens, height, width)
        rate = 0 if self.flexible or num_tokens is None else self._rate(num_tokens, height, width)
        nearest = functools.partial(self._nearest_ids, rate=rate)
        if self.device.type == "cpu" and len(images):
            token_ids = torch.cat(on_single_threads(nearest, images))
        else:
            token_ids = nearest(images)
        return token_ids[:, :num_tokens]

    def _nearest_ids(self, images: Tensor, rate: int = 0) -> Tensor:
        return self.ids_of_latents(self.latents.encode(images), rate)

    @torch.no_grad()
    def ids_of_latents(self, latents: Tensor, rate: int = 0) -> Tensor:
        """Token ids (B, L) of scaled latents (B, C, h, w), as ``encode`` finds them."""
        # Vectors differ by less than a hundredth of what they are made of, and bf16 rounds to not much less.
        with without_autocast(latents):
            vectors, _, _ = self.embed(latents.to(self.dtype), noise_scale=0.0, entropies=False, rate=rate)
            return self.quantizer(vectors).token_ids

    def embed(
        self,
        latents: Tensor,
        noise_scale: float | Tensor,
        entropies: bool = True,
        rate: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(v (B, n, D), word entropy, batch entropy) of scaled latents: Eq. 4, not yet quantised.

        Without ``entropies``, or without a vocabulary, both are 0.
        """
        tokens = self.resampler(latents, rate)
        if self.vocabulary is None:
            zero = tokens.new_zeros(())
            return self.to_code(tokens), zero, zero
        out = self.vocabulary(tokens, noise_scale, entropies)
        return out.embeddings, out.mean_entropy, out.batch_entropy

    # -- token ids -> image --------------------------------------------------------------------------------

    @torch.no_grad()
    @tf32(False)
    def decode(
        self,
        token_ids: Tensor,
        *,
        lengths: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        seeds: Sequence[int] | None = None,
        decoder: str | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of token ids (B, L): Algorithm 1, guided as in Eq. 7.

        Args:    lengths, one per image: decode only the first so many ids of a row, where the length is flexible
                 (default: those before the first negative one, as ``DrawingLM.generate`` ends a row);
                 height, width in pixels (default: the square image with L tokens, the config's size where the
                 length is flexible); ``seeds``, one per image, make each independent of its batch,
                 bit by bit on a CPU, where each image has one thread to itself;
                 ``decoder``, one of ``decoder_names`` (default: the one it was loaded with);
                 ``sampling``, fields of the recipe's section, which where missing or None are the config's.
        Raises:  ValueError for ids out of range, or an L that fits no image; ModelError for sampling settings
                 that this tokenizer does not have.
        """
        if decoder not in (None, self.decoder_name):
            other = self.with_decoder(decoder)
            return other.decode(token_ids, lengths=lengths, height=height, width=width, seeds=seeds, **sampling)
        given = {key: value for key, value in sampling.items() if value is not None}
        settings: Sampling = dataclasses.replace(self.config.section("sampling"), **given)
        if height is None or width is None:
            height, width = self.grid_of(token_ids.shape[1])
        if lengths is None and self.flexible and token_ids.numel():
            lengths = (token_ids >= 0).sum(1).tolist()
            token_ids = token_ids.clamp_min(0)
        counts = [token_ids.shape[1]] * len(token_ids) if lengths is None else list(lengths)
        for count in {token_ids.shape[1], *counts}:
            self.check_length(count, height, width)
        if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < self.config.codebook_size:
            raise ValueError(f"token ids must lie in [0, {self.config.codebook_size})")
        seeds = list(range(len(token_ids))) if seeds is None else list(seeds)
        if not len(seeds) == len(counts) == len(token_ids):
            raise ValueError(f"{len(seeds)} seeds and {len(counts)} lengths for {len(token_ids)} images")

        def decode_rows(rows: Tensor) -> Tensor:
            own = [seeds[row] for row in rows.tolist()]
            tokens = self.quantizer.embed(token_ids[rows].to(self.device)).to(self.dtype)
            kept = torch.tensor([counts[row] for row in rows.tolist()], device=self.device) if self.flexible else None
            noise = settings.noise_temperature * self._seeded_noise(own, patch_rows * patch_columns)
            places = self._places(height, width, len(tokens), rate)
            patches = self.decoder.sample(tokens, kept, places, noise, own, settings)
            return self.latents.decode(self._unpatchify(patches, patch_rows, patch_columns))

        patch_rows, patch_columns = self._patch_grid(height, width)
        rate = 0 if self.flexible else self._rate(token_ids.shape[1], height, width)
        every = torch.arange(len(token_ids))
        if self.device.type == "cpu" and len(token_ids):
            return torch.cat(on_single_threads(decode_rows, every))
        return decode_rows(every)

    # -- training ------------------------------------------------------------------------------------------

    def plan_step(
        self,
        step: int,
        latents: torch.Size,
        loss: TokenizerLoss,
        draw: random.Random,
        noise_scale: float | Tensor = 0.0,
        coarse: bool = False,
        context: Context | None = None,
        sampling: Sampling | None = None,
    ) -> StepPlan:
        """What a training pass over latents of shape (B, C, h, w) needs to know before it starts.

        ``coarse`` allows few numbers of hidden patches only. Where sampling uses no guidance, the masked decoder spares
        the images that would see D a pass of their own; in a flow transformer they cost nothing. ``context`` and
        ``sampling`` are the config's, which takes a millisecond to parse.
        """
        batch, _, height, width = latents
        if sampling is None:
            context, sampling = self.config.section("context"), self.config.section("sampling")
        u, v, hidden = draw.random(), draw.random(), 0
        share = loss.guidance_dropout
        if context is not None:
            positions = (height // self.patch_size) * (width // self.patch_size)
            ratio = mask_ratio(context.mask_ratio_min, context.mask_ratio_std, u)
            hidden = hidden_patches(ratio, positions, coarse)
            share = share if sampling.guidance_scale != 1 else 0.0
        return StepPlan(
            hidden=hidden,
            dropped=count_dropped(share, batch, v),
            rate=self.resampler.rate_at(step),
            quantizer_step=self.quantizer.first_like(step),
            noise_scale=noise_scale,
            drawn=Drawn.of(loss, sampling, batch),
        )

    def forward(
        self,
        latents: Tensor,
        loss: TokenizerLoss,
        plan: StepPlan | None = None,
        step: int = 0,
        noise_scale: float = 0.0,
        token_ids: Tensor | None = None,
    ) -> V2FlowOutput:
        """One training pass over scaled latents (B, C, h, w); randomness comes from torch's generators.

        Without a ``plan`` of the step this pass draws its own, for ``step`` and ``noise_scale``. While the quantiser is
        frozen, tokens are those of ``encode``, or the given ``token_ids`` (B, n) of an earlier pass, and nothing before
        them has a loss.

        Source: sections 2.2 and 2.3; a share ``loss.guidance_dropout`` of the images sees the dummy D (Eq. 7). Of an
        ordered sequence each image keeps a prefix of random length (nested dropout, FlexTok).
        """
        height, width = (side * self.latents.downsampling for side in latents.shape[-2:])
        if plan is None:
            seed = int(torch.randint(2**62, ()))
            plan = self.plan_step(step, latents.shape, loss, random.Random(seed), noise_scale)
        rate = plan.rate
        if self.training and not self.quantizer.training:
            token_ids = self.ids_of_latents(latents, rate) if token_ids is None else token_ids
            word_entropy = batch_entropy = commit_loss = latents.new_zeros(())
            embeddings = self.quantizer.embed(token_ids)
        else:
            vectors, word_entropy, batch_entropy = self.embed(latents, plan.noise_scale, rate=rate)
            quantized = self.quantizer(vectors, plan.quantizer_step if self.quantizer.training else None)
            embeddings, token_ids, commit_loss = quantized.embeddings, quantized.token_ids, quantized.commit_loss
        lengths = self.resampler.prefix_lengths(len(latents), latents.device)
        places = self._places(height, width, len(latents), rate)
        tokens = embeddings.to(latents.dtype)
        decoded = self.decoder.losses(self._patchify(latents), tokens, lengths, places, loss, plan)
        predicted = self._unpatchify(decoded.patches, *self._patch_grid(height, width))
        return V2FlowOutput(
            decoded.flow,
            decoded.regression,
            commit_loss,
            batch_entropy,
            word_entropy,
            token_ids,
            predicted,
        )

    # -- shapes --------------------------------------------------------------------------------------------

    def _patch_grid(self, height: int, width: int) -> tuple[int, int]:
        side = self.latents.downsampling * self.patch_size
        return height // side, width // side

    def _places(self, height: int, width: int, batch: int, rate: int = 0) -> Places:
        rows, columns = self._patch_grid(height, width)
        patches = grid_coordinates(rows, columns, rows, columns, self.device)
        tokens, *numbers = self.resampler.places(height, width, rows, columns, self.device, rate)
        cells, parts = (number.expand(batch, -1) for number in numbers)
        return Places(tokens.expand(batch, -1, -1), patches.expand(batch, -1, -1), cells, parts, rate)

    def _patchify(self, latents: Tensor) -> Tensor:
        p = self.patch_size
        return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)

    def _unpatchify(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        p = self.patch_size
        return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, w=columns, p=p, q=p)

    def _seeded_noise(self, seeds: Sequence[int], positions: int) -> Tensor:
        shape = (positions, self.latents.channels * self.patch_size**2)
        # Drawn on the CPU in float32, so that a seed means the same noise on every device.
        draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(draws).to(self.device, self.dtype)

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
    ) -> V2FlowTokenizer:
        """The tokenizer in a folder or on the hub, in eval mode; without an argument the embedded one.

        Args:    decoder, one of its ``decoder_names`` (default: the one that the model names);
                 revision, token, cache_dir, local_files_only: of a hub id, as ``runtime.hub.model_folder`` takes them;
                 kwargs, as PretrainedModule.from_pretrained takes them: dtype (default: float32), config.
        Raises:  ModelError for anything that is not a complete v2flow tokenizer, and a decoder that it does not have.
        """
        place = EMBEDDED_MODEL if path_or_id is None else path_or_id
        folder = model_folder(
            place, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        try:
            config, _ = V2FlowConfig.get_config_dict(folder)
            if config.get("model_type") != V2FlowConfig.model_type:
                found = f"a model of type {config['model_type']!r}" if "model_type" in config else "no model"
                raise ModelError(f"{place}: {found}; expected a v2flow tokenizer (a folder written by `v2flow train`).")
            model = super().from_pretrained(folder, name=str(place), **kwargs)
        except ModelError:
            raise
        except Exception as error:  # transformers and safetensors each raise their own kinds
            raise ModelError(f"{place}: not a loadable v2flow tokenizer ({reason_of(error)}).") from error
        for name in model.config.decoders or {}:  # one that is missing is told when it is asked for
            file = folder / decoder_file(name)
            model._decoder_files[name] = file if file.is_file() else None
        return model.with_decoder(decoder)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write ``config.json``, ``model.safetensors``, ``preprocessor_config.json``, and the other decoders' files."""
        if self.decoder_name != FAITHFUL:
            return self.with_decoder(FAITHFUL).save_pretrained(save_directory, **kwargs)
        super().save_pretrained(str(save_directory), **kwargs)
        self.image_processor.save_pretrained(str(save_directory))
        copy_decoders(self._decoder_files, Path(save_directory))

    @torch.no_grad()
    @tf32(False)
    def autoencode(self, images: Tensor) -> Tensor:
        """Images through the autoencoder alone: the ceiling of any reconstruction."""
        return self.latents.decode(self.latents.encode(images.to(self.device, self.dtype)))
