"""The V2Flow tokenizer: images -> token ids -> images, and its training pass."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from v2flow_cli.recipe.schema import Sampling, TokenizerLoss
from v2flow_cli.runtime.batch_invariant import on_single_threads
from v2flow_cli.runtime.device import tf32, without_autocast
from v2flow_cli.runtime.processes import world_size
from v2flow_cli.tokenizer.assembly import TokenizerAssembly
from v2flow_cli.tokenizer.context import grid_coordinates
from v2flow_cli.tokenizer.decoder import ImageLossPlan, Layout, StepPlan, TokenInput
from v2flow_cli.tokenizer.other_decoders import FAITHFUL
from v2flow_cli.tokenizer.refine import refine_ids

# The decoder's mean of all pictures that fit the tokens, in one step.
MEAN = Sampling(
    num_mask_steps=1,
    num_flow_steps=1,
    solver="euler",
    guidance_scale=1.0,
    guidance_schedule="constant",
    noise_temperature=0.0,
)


@dataclass(frozen=True)
class V2FlowOutput:
    """Loss terms (scalars) and diagnostics of one training pass; the images that saw the dummy D come first."""

    flow_loss: Tensor
    regression_loss: Tensor
    commit_loss: Tensor
    batch_entropy: Tensor  # nats; 0 without a vocabulary
    word_entropy: Tensor  # nats
    token_ids: Tensor  # (B, n); -1 for a dropped token that was not computed
    latents: Tensor  # (B, C, h, w) predicted; visible patches unchanged


class V2FlowTokenizer(TokenizerAssembly):
    """Images to sequences of discrete tokens in an LLM's vocabulary space, and back.

    ``V2FlowTokenizer.from_pretrained()`` loads the embedded model; pass a folder or a hub id for another.
    """

    # -- image -> token ids --------------------------------------------------------------------------------

    @torch.no_grad()
    @tf32(False)
    def encode(self, images: Tensor, num_tokens: int | None = None, refine_steps: int | None = None) -> Tensor:
        """Token ids (B, L) int64 of images (B, 3, H, W) in [-1, 1]; deterministic.

        ``num_tokens`` is one of ``lengths``; if the length is flexible, only the first so many ids are returned.
        ``refine_steps`` gradient steps then look for ids that the decoder reads better (``refine_ids``), for this
        number of tokens (default: see ``steps_to_refine``); with several decoders, that is ``faithful``.

        On a CPU each image is computed by one thread: an id near the border of two codes must not depend on the other
        images in the batch, nor on the number of threads.
        Raises:  ValueError for a size, a number of tokens or a number of steps that does not fit.
        """
        images = images.to(self.device, self.dtype)
        height, width = images.shape[-2:]
        length = self.num_tokens(height, width) if num_tokens is None else num_tokens
        self.check_length(length, height, width)
        rate, steps = self.resampler.rate_of(length, height, width), self.steps_to_refine(num_tokens, refine_steps)

        reader = self.with_decoder(FAITHFUL) if steps else self  # refined ids are those of one decoder

        def ids_of(images: Tensor) -> Tensor:
            latents = self.latents.encode(images)
            if steps:
                return reader._refined_ids(latents, rate, length, steps)
            return self.ids_of_latents(latents, rate)[:, :length]

        on_cpu = self.device.type == "cpu" and len(images)
        return torch.cat(on_single_threads(ids_of, images)) if on_cpu else ids_of(images)

    def steps_to_refine(self, num_tokens: int | None, refine_steps: int | None) -> int:
        """The gradient steps of ``encode`` with these arguments.

        ``refine_steps`` None are the config's. If the length is flexible and no ``num_tokens`` is given, there are
        none: every prefix of the encoder's ids can be decoded, and refined ids are good at one length only.
        """
        if refine_steps is None:
            return 0 if self.flexible and num_tokens is None else self.config.refine_steps
        return refine_steps

    def _refined_ids(self, latents: Tensor, rate: int, length: int, steps: int) -> Tensor:
        """Ids (B, length) whose mean picture (one step without noise or guidance) is nearest to scaled latents."""
        with without_autocast(latents):
            vectors, _, _ = self.embed(latents.to(self.dtype), noise_scale=0.0, entropies=False, rate=rate)
        height, width = (side * self.latents.downsampling for side in latents.shape[-2:])
        with torch.inference_mode(False):  # of a normal mode all that gradients pass
            target = self._patchify(latents).clone()
            layout = self._layout(height, width, len(latents), rate)
            lengths = torch.full((len(latents),), length, device=self.device) if self.flexible else None

        def error(embeddings: Tensor) -> Tensor:
            inputs = TokenInput(embeddings.to(target.dtype), lengths, layout)
            mean = self.decoder.sample(inputs, torch.zeros_like(target), [0] * len(target), MEAN)
            return (mean.float() - target.float()).square().mean((1, 2))

        return refine_ids(vectors[:, :length], self.quantizer, error, steps)

    @torch.no_grad()
    def ids_of_latents(self, latents: Tensor, rate: int = 0) -> Tensor:
        """Token ids (B, L) of scaled latents (B, C, h, w), the same as ``encode`` returns."""
        # Vectors differ by less than a hundredth of their length, and the rounding error of bf16 is not much smaller.
        with without_autocast(latents):
            vectors, _, _ = self.embed(latents.to(self.dtype), noise_scale=0.0, entropies=False, rate=rate)
            return self.quantizer(vectors).token_ids

    def embed(
        self,
        latents: Tensor,
        noise_scale: float | Tensor,
        entropies: bool = True,
        rate: int = 0,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(v (B, n, D), word entropy, batch entropy) of scaled latents: Eq. 4, before quantisation.

        Without ``entropies``, or without a vocabulary, both are 0. With ``kept`` (B, n), which is True for M tokens, v
        is (1, M, D).
        """
        tokens = self.resampler(latents, rate)
        if kept is not None:
            tokens = tokens[kept][None]
        if self.vocabulary is None:
            zero = tokens.new_zeros(())
            return self.to_code(tokens), zero, zero
        out = self.vocabulary(tokens, noise_scale, entropies)
        return out.embeddings, out.mean_entropy, out.batch_entropy

    @torch.no_grad()
    @tf32(False)
    def autoencode(self, images: Tensor) -> Tensor:
        """Images through the autoencoder alone: the upper limit of any reconstruction."""
        return self.latents.decode(self.latents.encode(images.to(self.device, self.dtype)))

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

        Args:    lengths, one per image: decode only the first so many ids of a row, if the length is flexible
                 (default: those before the first negative one, which ends a row of ``DrawingLM.generate``);
                 height, width in pixels (default: the square image with L tokens, or the config's size if the
                 length is flexible); seeds, one per image, make each image independent of its batch,
                 bit by bit on a CPU, where each image is computed by one thread;
                 decoder, one of ``decoder_names`` (default: the one it was loaded with);
                 sampling, fields of the recipe's section; missing ones and None take the config's value.
        Raises:  ValueError for ids out of range, or an L that fits no image; ModelError for sampling settings
                 that this tokenizer does not have.
        """
        if decoder not in (None, self.decoder_name):
            other = self.with_decoder(decoder)
            return other.decode(token_ids, lengths=lengths, height=height, width=width, seeds=seeds, **sampling)
        changes = {key: value for key, value in sampling.items() if value is not None}
        settings: Sampling = dataclasses.replace(self.config.section("sampling"), **changes)
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
            row_seeds = [seeds[row] for row in rows.tolist()]
            vectors = self.quantizer.embed(token_ids[rows].to(self.device)).to(self.dtype)
            row_counts = torch.tensor([counts[row] for row in rows.tolist()], device=self.device)
            inputs = TokenInput(
                vectors, row_counts if self.flexible else None, self._layout(height, width, len(rows), rate)
            )
            noise = settings.noise_temperature * self._seeded_noise(row_seeds, patch_rows * patch_columns)
            patches = self.decoder.sample(inputs, noise, row_seeds, settings)
            return self.latents.decode(self._unpatchify(patches, patch_rows, patch_columns), self.pixel_decoder)

        patch_rows, patch_columns = self._patch_grid(height, width)
        rate = self.resampler.rate_of(token_ids.shape[1], height, width)
        rows = torch.arange(len(token_ids))
        if self.device.type == "cpu" and len(token_ids):
            return torch.cat(on_single_threads(decode_rows, rows))
        return decode_rows(rows)

    # -- training ------------------------------------------------------------------------------------------

    def plan_step(
        self,
        step: int,
        latents: torch.Size,
        loss: TokenizerLoss,
        draw: random.Random,
        noise_scale: float | Tensor = 0.0,
        coarse: bool = False,
        sampling: Sampling | None = None,
    ) -> StepPlan:
        """The plan of a training pass over latents of shape (B, C, h, w).

        ``coarse`` allows only few numbers of hidden patches. ``sampling`` is the config's, which takes a millisecond to
        parse.
        """
        batch, _, height, width = latents
        sampling = self.config.section("sampling") if sampling is None else sampling
        positions = (height // self.patch_size) * (width // self.patch_size)
        u, v = draw.random(), draw.random()
        hidden, dropped = self.decoder.plan(u, v, batch, positions, loss, sampling, coarse)
        return StepPlan(
            hidden=hidden,
            dropped=dropped,
            rate=self.resampler.rate_at(step),
            quantizer_step=self.quantizer.first_like(step),
            noise_scale=noise_scale,
            image_losses=ImageLossPlan.of(loss, sampling, batch),
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

        Without a ``plan`` this pass draws its own, for ``step`` and ``noise_scale``. While the quantiser is frozen, the
        tokens are those of ``encode``, or the ``token_ids`` (B, n) of an earlier pass, and the losses of the encoder
        are 0.

        Source: sections 2.2 and 2.3; a share ``loss.guidance_dropout`` of the images sees the dummy D (Eq. 7). Of an
        ordered sequence each image keeps a prefix of random length (nested dropout, FlexTok).
        """
        height, width = (side * self.latents.downsampling for side in latents.shape[-2:])
        if plan is None:
            seed = int(torch.randint(2**62, ()))
            plan = self.plan_step(step, latents.shape, loss, random.Random(seed), noise_scale)
        rate = plan.rate
        lengths = self.resampler.prefix_lengths(len(latents), latents.device)
        if self.training and not self.quantizer.training:
            token_ids = self.ids_of_latents(latents, rate) if token_ids is None else token_ids
            word_entropy = batch_entropy = commit_loss = latents.new_zeros(())
            embeddings = self.quantizer.embed(token_ids)
        else:
            kept = self._kept_tokens(lengths)
            vectors, word_entropy, batch_entropy = self.embed(latents, plan.noise_scale, rate=rate, kept=kept)
            quantized = self.quantizer(vectors, plan.quantizer_step if self.quantizer.training else None)
            embeddings, token_ids, commit_loss = quantized.embeddings, quantized.token_ids, quantized.commit_loss
            if kept is not None:
                embeddings = embeddings.new_zeros(*kept.shape, embeddings.shape[-1]).masked_scatter(
                    kept[..., None], embeddings
                )
                token_ids = token_ids.new_full(kept.shape, -1).masked_scatter(kept, token_ids)
        inputs = TokenInput(embeddings.to(latents.dtype), lengths, self._layout(height, width, len(latents), rate))
        decoded = self.decoder.losses(self._patchify(latents), inputs, loss, plan)
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

    def _kept_tokens(self, lengths: Tensor | None) -> Tensor | None:
        """True (B, n) for the tokens that nested dropout keeps, if a step should compute these alone.

        A mixture of words is most of the work of a step, and no picture shows those of dropped tokens; the commitment
        loss, the entropies and the codebook then follow the kept ones. On a GPU, and with several processes, the sizes
        of a step must not depend on its values, so all of them are computed there.
        """
        if lengths is None or self.vocabulary is None or lengths.device.type != "cpu" or world_size() > 1:
            return None
        if torch.compiler.is_compiling():
            return None
        return torch.arange(self.resampler.lengths[0]) < lengths[:, None]

    # -- shapes --------------------------------------------------------------------------------------------

    def _layout(self, height: int, width: int, batch: int, rate: int) -> Layout:
        rows, columns = self._patch_grid(height, width)
        patches = grid_coordinates(rows, columns, rows, columns, self.device)
        tokens, *indices = self.resampler.layout(height, width, rows, columns, self.device, rate)
        token_index, part_index = (index.expand(batch, -1) for index in indices)
        return Layout(tokens.expand(batch, -1, -1), patches.expand(batch, -1, -1), token_index, part_index, rate)

    def _patchify(self, latents: Tensor) -> Tensor:
        p = self.patch_size
        return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)

    def _unpatchify(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        p = self.patch_size
        return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, w=columns, p=p, q=p)

    def _seeded_noise(self, seeds: Sequence[int], positions: int) -> Tensor:
        shape = (positions, self.latents.channels * self.patch_size**2)
        # Drawn on the CPU in float32, so that a seed means the same noise on every device.
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(noise).to(self.device, self.dtype)
