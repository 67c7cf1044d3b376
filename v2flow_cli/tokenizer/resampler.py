"""Latents -> visual tokens -> soft mixtures of LLM words (section 2.2, Eq. 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models.regnet import RegStage
from torch import Tensor, nn

from v2flow_cli.recipe.schema import Resampler, Vocabulary

REFERENCE_PX = 256  # token counts are given for images of this side


class GridResampler(nn.Module):
    """RegStage blocks, a spatial downsampler, RegStage blocks and a read-out MLP, on a grid of tokens.

    Scaled latents (B, C, h, w) become tokens (B, n, d_v), flattened row by row. Where latents are coarser than the
    token grid (f32 latents, 256 tokens at 256 px), a transposed convolution splits each into its tokens.

    Raises:  ValueError where neither grid is a whole multiple of the other.
    """

    def __init__(self, settings: Resampler, in_channels: int, pixels_per_latent: int) -> None:
        super().__init__()
        width = settings.hidden_size
        self.tokens_per_256px = settings.tokens_per_256px
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.before = _reg_stage(settings.depth[0], width)
        rows, columns = REFERENCE_GRIDS[settings.tokens_per_256px]
        side = REFERENCE_PX // pixels_per_latent
        merge, split = (side // rows, side // columns), (rows // side, columns // side)
        # A strided convolution, as in latent diffusion: averaging neighbours would hide which of them had what.
        if (merge[0] * rows, merge[1] * columns) == (side, side):
            self.downsample: nn.Module = nn.Conv2d(width, width, merge, stride=merge)
        elif (split[0] * side, split[1] * side) == (rows, columns):
            self.downsample = nn.ConvTranspose2d(width, width, split, stride=split)
        else:
            raise ValueError(f"{side} x {side} latents do not divide into {rows} x {columns} tokens at 256 px")
        self.after = _reg_stage(settings.depth[1], width)
        self.readout = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of tokens for an image of ``height`` x ``width`` pixels."""
        rows, columns = REFERENCE_GRIDS[self.tokens_per_256px]
        return height * rows // REFERENCE_PX, width * columns // REFERENCE_PX

    def forward(self, latents: Tensor) -> Tensor:
        x = self.stem(latents.contiguous(memory_format=torch.channels_last))
        x = F.silu(self.downsample(self.before(x)))
        x = self.after(x)
        return self.readout(x.flatten(2).transpose(1, 2))


REFERENCE_GRIDS = {64: (8, 8), 128: (8, 16), 256: (16, 16)}


def _reg_stage(depth: int, width: int) -> nn.Module:
    if not depth:
        return nn.Identity()
    return RegStage(
        depth=depth, in_chs=width, out_chs=width, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d
    )


@dataclass(frozen=True)
class VocabularyOutput:
    """``embeddings`` (B, N, D) are the mixtures v; ``mean_entropy`` and ``batch_entropy`` are in nats."""

    embeddings: Tensor
    mean_entropy: Tensor  # of each token's own distribution, averaged
    batch_entropy: Tensor  # of the distribution averaged over the batch


class VocabularyProjection(nn.Module):
    """The generator G, the Gumbel-softmax over the frozen vocabulary L, and v = alpha L (Eq. 4).

    ``table`` holds (L - mean) / rms: because alpha sums to 1, a mixture of these rows is the mixture of the
    LLM's own rows after one fixed affine map, so v still lives in the LLM's vocabulary space, while cosine
    distances are not swamped by the mean that all rows share. ``codebook_to_llm`` undoes the map.
    """

    def __init__(self, settings: Vocabulary, token_size: int, vocab_size: int, embedding_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("table", torch.zeros(vocab_size, embedding_size))
        self.register_buffer("table_mean", torch.zeros(embedding_size))
        self.register_buffer("table_rms", torch.ones(()))
        out = embedding_size if settings.generator == "tied" else vocab_size
        self.generator = nn.Linear(token_size, out)
        if settings.generator == "tied":
            self.log_scale = nn.Parameter(torch.tensor(math.log(settings.logit_scale)))

    @torch.no_grad()
    def set_table(self, vocab_embeddings: Tensor) -> None:
        """Freeze the vocabulary (V, D) of an LLM."""
        rows = vocab_embeddings.float()
        mean = rows.mean(0)
        rms = (rows - mean).square().mean().sqrt()
        self.table.copy_((rows - mean) / rms)
        self.table_mean.copy_(mean)
        self.table_rms.copy_(rms)

    def codebook_to_llm(self, codebook: Tensor) -> Tensor:
        """Codes (K, D) in the embedding space of the LLM: the affine map of ``table`` undone."""
        return codebook * self.table_rms + self.table_mean

    def forward(self, tokens: Tensor, noise_scale: float = 0.0) -> VocabularyOutput:
        """Mixtures v (B, N, D) of tokens (B, N, d_v); ``noise_scale`` 0 is deterministic, 1 is Eq. 4."""
        projected = self.generator(tokens)
        if self.settings.top_k:
            logits, rows = self._top_logits(projected)
        else:
            logits, rows = self._all_logits(projected), None
        if noise_scale:
            # -log of an exponential variate is a Gumbel variate, at one logarithm an entry.
            logits = logits - noise_scale * torch.empty_like(logits).exponential_().log_()
        log_probs = F.log_softmax(logits / self.settings.temperature, dim=-1)
        probs = log_probs.exp()  # alpha of Eq. 4
        if rows is None:
            embeddings = probs @ self.table.to(probs.dtype)
            average = probs.flatten(0, -2).mean(0).float()
            batch_entropy = -(average * (average + 1e-9).log()).sum()
        else:
            embeddings = torch.einsum("bnk,bnkd->bnd", probs, rows)
            batch_entropy = torch.zeros((), device=probs.device)  # needs the whole vocabulary
        with torch.no_grad():
            mean_entropy = -(probs * log_probs).sum(-1).mean()
        return VocabularyOutput(embeddings, mean_entropy, batch_entropy)

    def _all_logits(self, projected: Tensor) -> Tensor:
        if self.settings.generator == "free":
            return projected
        unit_rows = F.normalize(self.table, dim=-1).to(projected.dtype)
        return self.log_scale.exp() * (F.normalize(projected, dim=-1) @ unit_rows.T)

    def _top_logits(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, N, k) and rows (B, N, k, D) of each token's k best words; the rest get no weight."""
        k = min(self.settings.top_k, len(self.table))
        if self.settings.generator == "free":
            logits, index = projected.topk(k, dim=-1)
            return logits, self.table[index].to(projected.dtype)
        unit = F.normalize(projected, dim=-1)
        with torch.no_grad():
            best = index = None
            for start in range(0, len(self.table), VOCAB_CHUNK):  # V x N logits never exist at once
                chunk = F.normalize(self.table[start : start + VOCAB_CHUNK], dim=-1).to(unit.dtype)
                value, where = (unit @ chunk.T).topk(min(k, len(chunk)), dim=-1)
                where = where + start
                if best is not None:
                    value, where = torch.cat([best, value], -1), torch.cat([index, where], -1)
                best, order = value.topk(min(k, value.shape[-1]), dim=-1)
                index = where.gather(-1, order)
        rows = self.table[index].to(projected.dtype)
        logits = self.log_scale.exp() * torch.einsum("bnd,bnkd->bnk", unit, F.normalize(rows, dim=-1))
        return logits, rows


VOCAB_CHUNK = 8192  # vocabulary rows scored at a time in top-k mixing
