"""Soft embedding -> token id -> codebook vector: nearest code, EMA codebook (section 2.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from v2flow_cli.recipe.schema import Quantizer

STATISTICS_RATE = 0.05  # of the running mean and standard deviation, per step


@dataclass(frozen=True)
class QuantizerOutput:
    """``embeddings`` (B, N, D) with straight-through gradients; ``token_ids`` (B, N) int64; a scalar loss."""

    embeddings: Tensor
    token_ids: Tensor
    commit_loss: Tensor


class EMAQuantizer(nn.Module):
    """A codebook (K, D) moved by exponential averages of the vectors that chose each code.

    Vectors are first standardised by running statistics. Silent: the paper does not say how; soft mixtures of
    thousands of words all lie within a narrow cone, where a cosine hardly tells them apart and the decoder sees
    little but their mean. One diagonal affine map keeps them in the vocabulary's space (``vectors`` undoes it).
    With ``distance: cosine`` vectors and codes have unit length. For the first ``start_step`` steps nothing is
    quantised, and the codebook is a ring of the newest real vectors, which ``kmeans_steps`` of k-means then
    turn into means; from then on it is averaged. A codebook drawn while the encoder is still constant dies at once.
    All arithmetic is float32, also under autocast.
    """

    def __init__(self, settings: Quantizer, code_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("codebook", F.normalize(torch.randn(settings.codebook_size, code_size), dim=-1))
        self.register_buffer("counts", torch.ones(settings.codebook_size))  # running vectors per step
        if settings.usage_decay:
            self.register_buffer("usage", torch.ones(settings.codebook_size))  # as counts, forgotten sooner
        self.register_buffer("ring_position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(code_size))
        self.register_buffer("std", torch.ones(code_size))
        # A standardised vector has length sqrt(D) on average; the cosine codebook keeps its direction alone. What
        # leaves the quantiser is at the standard scale again: unit vectors would drown in the decoder's residuals.
        self.length = code_size**0.5 if settings.distance == "cosine" else 1.0

    def forward(self, vectors: Tensor, step: int | None = None) -> QuantizerOutput:
        """Quantise (B, N, D). ``step`` is the training step, which also updates the codebook; None freezes it."""
        with torch.autocast(vectors.device.type, enabled=False):
            if step is not None:
                self._follow(vectors.detach().float(), first=step == 0)
            # Copies: the next batch moves the statistics in place, maybe before this one's gradient is taken.
            vectors = self._prepare((vectors.float() - self.mean.clone()) / self.std.clone())
            if step is not None and step < self.settings.start_step:
                self._prepare_codebook(vectors.detach(), steps_left=self.settings.start_step - step)
                ids = torch.zeros(vectors.shape[:-1], dtype=torch.int64, device=vectors.device)
                return QuantizerOutput(self.length * vectors, ids, vectors.new_zeros(()))
            ids = self.nearest(vectors.detach())
            codes = self.codebook[ids]
            if step is not None:
                self._update(vectors.detach(), ids)
            commit_loss = (vectors - codes).square().sum(-1).mean()
            return QuantizerOutput(self.length * (vectors + (codes - vectors).detach()), ids, commit_loss)

    @property
    def vectors(self) -> Tensor:
        """The codes (K, D) in the space that vectors come from: standardisation undone."""
        return self.codebook * (self.length * self.std) + self.mean

    def embed(self, token_ids: Tensor) -> Tensor:
        """Codes (B, N, D) of token ids (B, N), at the scale of ``QuantizerOutput.embeddings``."""
        return self.length * self.codebook[token_ids]

    def nearest(self, vectors: Tensor) -> Tensor:
        """Ids of the nearest codes, the lowest id where two are equally near."""
        flat = vectors.flatten(0, -2)
        scores = flat @ self.codebook.T
        if self.settings.distance == "euclidean":
            scores = scores - 0.5 * self.codebook.square().sum(-1)
        return scores.argmax(-1).view(vectors.shape[:-1])

    def _prepare(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.settings.distance == "cosine" else vectors

    @torch.no_grad()
    def _follow(self, vectors: Tensor, first: bool) -> None:
        """Move the running mean and standard deviation of each dimension towards this batch's."""
        flat = _gather_ranks(vectors.flatten(0, -2))
        rate = 1.0 if first else STATISTICS_RATE
        self.mean.lerp_(flat.mean(0), rate)
        self.std.lerp_(flat.std(0).clamp_min(1e-6), rate)

    def _prepare_codebook(self, vectors: Tensor, steps_left: int) -> None:
        """Ring, k-means, running counts: what precedes quantisation, each harmless to repeat within a step."""
        kmeans_steps = self.settings.kmeans_steps
        if not kmeans_steps or steps_left > kmeans_steps + 1:
            self._fill_ring(vectors)
        elif steps_left > 1:
            self._step_kmeans(vectors)
        if steps_left == 1:  # every code starts as an average one
            self.counts.fill_(vectors[..., 0].numel() * _ranks() / len(self.codebook))
            self._running().copy_(self.counts)

    @torch.no_grad()
    def _fill_ring(self, vectors: Tensor) -> None:
        rows = _gather_ranks(vectors.flatten(0, -2))[-len(self.codebook) :]
        places = (torch.arange(len(rows), device=rows.device) + self.ring_position) % len(self.codebook)
        self.codebook[places] = rows
        self.ring_position.add_(len(rows)).remainder_(len(self.codebook))

    @torch.no_grad()
    def _step_kmeans(self, vectors: Tensor) -> None:
        """Mini-batch k-means (Sculley 2010): a code is the mean of the ring's vector and all that chose it since."""
        counts, sums = self._choices(vectors, self.nearest(vectors))
        # Until quantisation starts a count is the number of vectors in the mean; the ring's own is the first.
        totals = self.codebook * self.counts[:, None] + sums
        self.counts.add_(counts)
        self.codebook.copy_(self._prepare(totals / self.counts[:, None]))

    def _choices(self, vectors: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """How many vectors chose each code (K,), and their sums (K, D), over all ranks."""
        ids = ids.flatten()
        counts = torch.bincount(ids, minlength=len(self.codebook)).float()
        sums = torch.zeros_like(self.codebook).index_add_(0, ids, vectors.flatten(0, -2))
        _sum_ranks(counts)
        _sum_ranks(sums)
        return counts, sums

    @torch.no_grad()
    def _update(self, vectors: Tensor, ids: Tensor) -> None:
        """One EMA step, then revival of codes that (almost) nothing chose, with their EMA state."""
        counts, sums = self._choices(vectors, ids)
        decay = self.settings.ema_decay
        chosen = counts > 0
        # The running sum of a code is codebook * counts, so the code itself is its only state.
        totals = self.codebook * (decay * self.counts)[:, None] + (1 - decay) * sums
        self.counts.mul_(decay).add_(counts, alpha=1 - decay)
        moved = self._prepare(totals / self.counts.clamp_min(1e-12)[:, None])
        self.codebook.copy_(torch.where(chosen[:, None], moved, self.codebook))
        if self.settings.usage_decay:
            self.usage.lerp_(counts, 1 - self.settings.usage_decay)
        self._revive(_gather_ranks(vectors.flatten(0, -2)))

    def _running(self) -> Tensor:
        return self.usage if self.settings.usage_decay else self.counts

    def _dead(self) -> Tensor:
        """True (K,) for codes whose running use is below ``revive_after`` of the mean."""
        return self._running() < self.settings.revive_after * self._running().mean()

    def _revive(self, candidates: Tensor) -> None:
        dead = self._dead().nonzero().flatten()
        # At most an eighth of the batch a step: replacing every dead code from one batch copies that batch.
        picks = torch.randperm(len(candidates), device=candidates.device)[: max(1, len(candidates) // 8)]
        _broadcast(picks)
        order = torch.randperm(len(dead), device=dead.device)
        _broadcast(order)
        dead = dead[order][: len(picks)]
        self.codebook[dead] = candidates[picks[: len(dead)]]
        self.counts[dead] = self.counts.mean()
        self._running()[dead] = self._running().mean()

    def statistics(self) -> dict[str, float]:
        """Usage and perplexity of the running counts, and the number of codes near revival."""
        share = self.counts / self.counts.sum()
        entropy = -(share * (share + 1e-12).log()).sum()
        dead = self._dead().float()
        return {
            "codebook_usage": 1 - dead.mean().item(),
            "perplexity": entropy.exp().item(),
            "dead_codes": dead.sum().item(),
        }


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gather_ranks(rows: Tensor) -> Tensor:
    if _ranks() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(_ranks())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def _sum_ranks(tensor: Tensor) -> None:
    if _ranks() > 1:
        dist.all_reduce(tensor)


def _broadcast(tensor: Tensor) -> None:
    if _ranks() > 1:
        dist.broadcast(tensor, 0)
