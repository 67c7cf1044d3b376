"""Finite scalar quantisation: each component of a short vector rounded to its own levels (arXiv 2309.15505)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from v2flow_cli.recipe.schema import FSQ
from v2flow_cli.runtime.device import without_autocast
from v2flow_cli.runtime.processes import sum_in_place
from v2flow_cli.tokenizer.quantizer import QuantizerOutput, TokenQuantizer, perplexity

USAGE_DECAY = 0.99  # of the running counts, per step


class FSQQuantizer(TokenQuantizer):
    """A fixed lattice of codes, K = product of the levels; codes cannot collapse and are never replaced.

    A vector with as many components as there are levels is rounded directly. A wider one (a mixture of LLM words) is
    projected down before and up after rounding, so its codes lie in an affine subspace of ``len(levels)`` dimensions
    of the vocabulary space, and the commitment loss pulls the vectors towards it. Without projections that loss is 0.
    """

    levels: Tensor
    basis: Tensor
    counts: Tensor

    def __init__(self, settings: FSQ, vector_size: int) -> None:
        super().__init__()
        self.settings = settings
        levels = torch.tensor(settings.levels)
        width = len(levels)
        self.register_buffer("levels", levels)
        self.register_buffer("basis", torch.cumprod(levels, 0) // levels)  # 1, L1, L1 L2, ...
        self.register_buffer("counts", torch.zeros(settings.codebook_size))  # running vectors per step
        self.projected = vector_size != width
        self.down = nn.Linear(vector_size, width) if self.projected else nn.Identity()
        self.up = nn.Linear(width, vector_size) if self.projected else nn.Identity()

    def forward(self, vectors: Tensor, step: int | None = None) -> QuantizerOutput:
        """Quantise (B, N, D) with straight-through gradients; a training ``step`` also counts the codes."""
        with without_autocast(vectors):
            vectors = vectors.float()
            steps = self._round(self.down(vectors))
            ids = ((steps + self.levels // 2).round().long() * self.basis).sum(-1)
            codes = self.up(steps / (self.levels // 2))
            if step is not None:
                self._count(ids)
            commit_loss = (vectors - codes).square().mean() if self.projected else vectors.new_zeros(())
        return QuantizerOutput(codes, ids, commit_loss)

    def _round(self, x: Tensor) -> Tensor:
        """Whole numbers of steps from the middle: -L/2 to L/2 - 1 for even L, -(L - 1)/2 to (L - 1)/2 for odd."""
        half = (self.levels - 1) * (1 + 1e-3) / 2  # slightly larger, so that the outermost levels are reached
        offset = 0.5 * (self.levels % 2 == 0)
        bounded = torch.tanh(x + torch.atanh(offset / half)) * half - offset
        return bounded + (bounded.round() - bounded).detach()

    def embed(self, token_ids: Tensor) -> Tensor:
        digits = token_ids[..., None] // self.basis % self.levels
        half = self.levels // 2
        return self.up((digits - half) / half)

    @property
    def vectors(self) -> Tensor:
        return self.embed(torch.arange(self.settings.codebook_size, device=self.levels.device))

    @torch.no_grad()
    def _count(self, ids: Tensor) -> None:
        counts = torch.zeros_like(self.counts)
        counts.index_add_(0, ids.flatten(), torch.ones_like(ids.flatten(), dtype=counts.dtype))
        self.counts.mul_(USAGE_DECAY).add_(sum_in_place(counts), alpha=1 - USAGE_DECAY)

    def statistics(self) -> dict[str, Tensor]:
        """Usage (codes chosen in recent steps) and perplexity of the running counts."""
        alive = self.counts > (1 - USAGE_DECAY) * math.exp(-1)  # used once in the last 1 / (1 - decay) steps
        return {"codebook_usage": alive.float().mean(), "perplexity": perplexity(self.counts)}
