"""The V2Flow tokenizer: images -> token ids -> images. Assembles the parts of this room."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from v2flow_cli.errors import ModelError
from v2flow_cli.recipe.schema import Context, Flow, Quantizer, Resampler, Sampling, TokenizerLoss, Vocabulary
from v2flow_cli.tokenizer.context import MaskedTransformer, grid_cells, grid_coordinates
from v2flow_cli.tokenizer.flow import VelocityNetwork
from v2flow_cli.tokenizer.latents import Latents
from v2flow_cli.tokenizer.masking import gather, random_orders, sample_mask_ratio, seeded_orders
from v2flow_cli.tokenizer.preprocess import V2FlowImageProcessor
from v2flow_cli.tokenizer.quantizer import EMAQuantizer
from v2flow_cli.tokenizer.resampler import GridResampler, VocabularyProjection
from v2flow_cli.tokenizer.sampling import Places, sample_patches

EMBEDDED_MODEL = Path(__file__).resolve().parents[1] / "assets" / "default" / "tokenizer"
SECTIONS: dict[str, type] = {
    "vocabulary": Vocabulary,
    "resampler": Resampler,
    "quantizer": Quantizer,
    "context": Context,
    "flow": Flow,
    "sampling": Sampling,
}


class V2FlowConfig(PretrainedConfig):
    """The recipe's model sections, the autoencoder's own config, and the shape of the frozen vocabulary."""

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
        super().__init__(**kwargs)

    @property
    def codebook_size(self) -> int:
        return int((self.quantizer or {})["codebook_size"])

    def section(self, name: str) -> Any:
        """The dataclass of one section. Raises ModelError when its keys are not the schema's."""
        values = getattr(self, name)
        try:
            return SECTIONS[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        except (TypeError, AttributeError):
            known = ", ".join(f.name for f in dataclasses.fields(SECTIONS[name]))
            raise ModelError(f"config.json: section {name} does not fit this version; expected keys {known}.") from None


@dataclass(frozen=True)
class V2FlowOutput:
    """Loss terms (scalars) and diagnostics of one training pass."""

    flow_loss: Tensor
    regression_loss: Tensor
    commit_loss: Tensor
    batch_entropy: Tensor  # nats; 0 without a vocabulary
    word_entropy: Tensor  # nats
    token_ids: Tensor  # (B, n)


class V2FlowTokenizer(PreTrainedModel):
    """Images to sequences of discrete tokens in an LLM's vocabulary space, and back.

    ``V2FlowTokenizer.from_pretrained()`` loads the embedded model; pass a folder or a hub id for another.
    """

    config_class = V2FlowConfig
    config: V2FlowConfig
    base_model_prefix = "v2flow"
    main_input_name = "images"
    image_processor: V2FlowImageProcessor

    def __init__(self, config: V2FlowConfig) -> None:
        super().__init__(config)
        context, flow = config.section("context"), config.section("flow")
        quantizer, self.vocabulary_settings = config.section("quantizer"), config.section("vocabulary")
        resampler: Resampler = config.section("resampler")
        self.latents = Latents(config.autoencoder or {})
        self.patch_size = config.patch_size
        patch_numbers = self.latents.channels * config.patch_size**2
        self.resampler = GridResampler(resampler, self.latents.channels, self.latents.downsampling)
        vocab_size, embedding_size = config.vocab_shape
        self.vocabulary: VocabularyProjection | None = None
        if self.vocabulary_settings.llm != "none":
            self.vocabulary = VocabularyProjection(
                self.vocabulary_settings, resampler.hidden_size, vocab_size, embedding_size
            )
        else:  # the ablation without a vocabulary: a linear map to the code width takes its place
            embedding_size = quantizer.code_size
            self.to_code = nn.Linear(resampler.hidden_size, embedding_size)
        self.quantizer = EMAQuantizer(quantizer, embedding_size)
        self.context = MaskedTransformer(context, embedding_size, patch_numbers)
        self.flow = VelocityNetwork(flow, context.hidden_size, patch_numbers)
        self.image_processor = V2FlowImageProcessor(size=config.image_size)
        self._digest: str | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass  # each part initialises itself; parameters of the frozen autoencoder are loaded

    # -- sizes ---------------------------------------------------------------------------------------------

    @property
    def size_multiple(self) -> int:
        """Image sides must be a multiple of this many pixels."""
        rows, columns = self.resampler.token_grid(256, 256)
        cell = 256 // min(rows, columns)
        return math.lcm(self.latents.downsampling * self.patch_size, cell)

    def num_tokens(self, height: int, width: int) -> int:
        """Tokens of an image of ``height`` x ``width`` pixels. Raises ValueError if the sides do not fit."""
        if height < 1 or width < 1 or height % self.size_multiple or width % self.size_multiple:
            raise ValueError(
                f"an image of {height} x {width} pixels does not fit; sides must be multiples of {self.size_multiple}"
            )
        rows, columns = self.resampler.token_grid(height, width)
        return rows * columns

    @property
    def flexible(self) -> bool:
        """True if every prefix of an image's tokens decodes; False if an image has exactly ``num_tokens``."""
        return False

    @property
    def max_tokens(self) -> int:
        """Tokens of an image of the config's size; a flexible tokenizer takes 1 to this many, at any size."""
        return self.num_tokens(self.config.image_size, self.config.image_size)

    def grid_of(self, num_tokens: int) -> tuple[int, int]:
        """(height, width) in pixels of the square image that has ``num_tokens`` tokens; ValueError if none has."""
        side = round(math.sqrt(num_tokens / self.num_tokens(256, 256)) * 256) if num_tokens > 0 else 0
        if side <= 0 or side % self.size_multiple or self.num_tokens(side, side) != num_tokens:
            raise ValueError(
                f"no square image has {num_tokens} tokens; at {self.config.image_size} px it is {self.max_tokens}"
            )
        return side, side

    @property
    def digest(self) -> str:
        """16 hex digits over everything that determines ids and their meaning; token files carry it."""
        if self._digest is None:
            sha = hashlib.sha256()
            model = {name: getattr(self.config, name) for name in (*SECTIONS, "autoencoder", "patch_size")}
            model.pop("sampling")
            sha.update(json.dumps(model, sort_keys=True, default=list).encode())
            for name, tensor in sorted(self.state_dict().items()):
                sha.update(name.encode())
                sha.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
            self._digest = sha.hexdigest()[:16]
        return self._digest

    @property
    def codebook(self) -> Tensor:
        """The codes (K, D) in the embedding space of the LLM whose vocabulary was used (float32)."""
        codes = self.quantizer.vectors.float()
        return codes if self.vocabulary is None else self.vocabulary.codebook_to_llm(codes)

    # -- image -> token ids --------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Token ids (B, L) int64 of images (B, 3, H, W) in [-1, 1]; deterministic.

        On a CPU images are encoded one by one: matrix products round differently with the batch size, and an id
        on the border of two codes must not depend on the company it came in.
        """
        images = images.to(self.device, self.dtype)
        self.num_tokens(*images.shape[-2:])
        if self.device.type == "cpu" and len(images) > 1:
            return torch.cat([self.encode(image[None]) for image in images])
        vectors, _, _ = self.embed(self.latents.encode(images), noise_scale=0.0)
        return self.quantizer(vectors).token_ids

    def embed(self, latents: Tensor, noise_scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """(v (B, n, D), word entropy, batch entropy) of scaled latents: Eq. 4, not yet quantised."""
        tokens = self.resampler(latents)
        if self.vocabulary is None:
            zero = tokens.new_zeros(())
            return self.to_code(tokens), zero, zero
        out = self.vocabulary(tokens, noise_scale)
        return out.embeddings, out.mean_entropy, out.batch_entropy

    # -- token ids -> image --------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        token_ids: Tensor,
        *,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        num_mask_steps: int | None = None,
        num_flow_steps: int | None = None,
        solver: str | None = None,
        guidance_schedule: str | None = None,
        noise_temperature: float | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of token ids (B, L): Algorithm 1, guided as in Eq. 7.

        Args:    height, width in pixels (default: the square image with L tokens); the rest default to the
                 config's ``sampling``. ``seeds``, one per image, make each independent of its batch.
        Raises:  ValueError for ids out of range, or an L that fits no image.
        """
        defaults: Sampling = self.config.section("sampling")
        settings = Sampling(
            num_mask_steps=_choose(num_mask_steps, defaults.num_mask_steps),
            num_flow_steps=_choose(num_flow_steps, defaults.num_flow_steps),
            solver=_choose(solver, defaults.solver),
            guidance_scale=_choose(guidance_scale, defaults.guidance_scale),
            guidance_schedule=_choose(guidance_schedule, defaults.guidance_schedule),
            noise_temperature=_choose(noise_temperature, defaults.noise_temperature),
        )
        if height is None or width is None:
            height, width = self.grid_of(token_ids.shape[1])
        if self.num_tokens(height, width) != token_ids.shape[1]:
            raise ValueError(
                f"{token_ids.shape[1]} tokens, but {height} x {width} pixels take {self.num_tokens(height, width)}"
            )
        if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < self.config.codebook_size:
            raise ValueError(f"token ids must lie in [0, {self.config.codebook_size})")
        seeds = list(range(len(token_ids))) if seeds is None else list(seeds)
        if len(seeds) != len(token_ids):
            raise ValueError(f"{len(seeds)} seeds for {len(token_ids)} images")
        tokens = self.quantizer.embed(token_ids.to(self.device)).to(self.dtype)
        rows, columns = self._patch_grid(height, width)
        patches = sample_patches(
            self.context,
            self.flow,
            Places(*self._positions(height, width, len(tokens))),
            tokens,
            noise=settings.noise_temperature * self._seeded_noise(seeds, rows * columns),
            orders=seeded_orders(seeds, rows * columns, self.device),
            settings=settings,
        )
        return self.latents.decode(self._unpatchify(patches, rows, columns))

    # -- training ------------------------------------------------------------------------------------------

    def forward(self, latents: Tensor, step: int, noise_scale: float, loss: TokenizerLoss) -> V2FlowOutput:
        """One training pass over scaled latents (B, C, h, w); randomness comes from torch's generators.

        Source: sections 2.2 and 2.3; a share ``loss.guidance_dropout`` of the images sees the dummy D (Eq. 7).
        """
        height, width = (side * self.latents.downsampling for side in latents.shape[-2:])
        vectors, word_entropy, batch_entropy = self.embed(latents, noise_scale)
        quantized = self.quantizer(vectors, step if self.training else None)
        patches = self._patchify(latents)
        batch, positions, _ = patches.shape
        token_coordinates, coordinates, cells = self._positions(height, width, batch)
        settings: Context = self.config.section("context")
        ratio = sample_mask_ratio(settings.mask_ratio_min, settings.mask_ratio_std)
        order = random_orders(batch, positions, latents.device)
        hidden_count = max(1, math.ceil(ratio * positions))
        hidden, seen = order[:, :hidden_count], order[:, hidden_count:]
        visible, visible_at = gather(patches, seen), gather(coordinates, seen)
        hidden_at, hidden_cells, target = (
            gather(coordinates, hidden),
            cells.gather(1, hidden),
            gather(patches, hidden),
        )
        # D is one token, not n copies, so the images that see it form a batch of their own.
        dropped = min(batch, int(loss.guidance_dropout * batch + torch.rand(()).item()))
        tokens = quantized.embeddings.to(latents.dtype)
        contexts = []
        for part, known in ((slice(0, dropped), False), (slice(dropped, batch), True)):
            if part.start < part.stop:
                given = (tokens[part], token_coordinates[part]) if known else (None, None)
                rest = (visible, visible_at, hidden_at, hidden_cells)
                contexts.append(self.context(*given, *(x[part] for x in rest)))
        flow: Flow = self.config.section("flow")
        flow_loss, regression = self.flow.loss(target, torch.cat(contexts), flow)
        return V2FlowOutput(
            flow_loss, regression, quantized.commit_loss, batch_entropy, word_entropy, quantized.token_ids
        )

    # -- shapes --------------------------------------------------------------------------------------------

    def _patch_grid(self, height: int, width: int) -> tuple[int, int]:
        side = self.latents.downsampling * self.patch_size
        return height // side, width // side

    def _positions(self, height: int, width: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Positions of tokens (B, n, 2) and patches (B, N, 2), in patches, and each patch's token (B, N)."""
        rows, columns = self._patch_grid(height, width)
        grid = self.resampler.token_grid(height, width)
        tokens = grid_coordinates(*grid, rows, columns, self.device)
        patches = grid_coordinates(rows, columns, rows, columns, self.device)
        cells = grid_cells(*grid, rows, columns, self.device)
        return tokens.expand(batch, -1, -1), patches.expand(batch, -1, -1), cells.expand(batch, -1)

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
    def from_pretrained(cls, path_or_id: str | Path | None = None, **kwargs: Any) -> V2FlowTokenizer:
        """The tokenizer in a folder or on the hub, in eval mode; without an argument the embedded one.

        Raises:  ModelError for anything that is not a complete v2flow tokenizer.
        """
        place = str(EMBEDDED_MODEL if path_or_id is None else path_or_id)
        kwargs.setdefault("dtype", torch.float32)
        try:
            config, _ = V2FlowConfig.get_config_dict(place)
            if config.get("model_type") != V2FlowConfig.model_type:
                found = f"a model of type {config['model_type']!r}" if "model_type" in config else "no model"
                raise ModelError(f"{place}: {found}; expected a v2flow tokenizer (a folder written by `v2flow train`).")
            # Mismatches are reported, so that the check below can name them; none is ever ignored.
            model, info = super().from_pretrained(
                place, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except ModelError:
            raise
        except Exception as error:  # transformers, safetensors and the hub each raise their own kinds
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(f"{place}: not a loadable v2flow tokenizer ({reason}).") from error
        wrong = {k: sorted(map(str, v)) for k, v in info.items() if v and k != "error_msgs"}
        if wrong or info.get("error_msgs"):
            kind, names = next(iter(wrong.items()), ("errors", info.get("error_msgs")))
            raise ModelError(f"{place}: the weights do not fit the config ({kind}: {', '.join(names[:3])}).")
        return model.eval()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``."""
        super().save_pretrained(str(save_directory), **kwargs)
        self.image_processor.save_pretrained(str(save_directory))

    @torch.no_grad()
    def autoencode(self, images: Tensor) -> Tensor:
        """Images through the autoencoder alone: the ceiling of any reconstruction."""
        return self.latents.decode(self.latents.encode(images.to(self.device, self.dtype)))


def _choose(given: Any, default: Any) -> Any:
    return default if given is None else given
