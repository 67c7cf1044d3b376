"""Soft embedding -> token id -> codebook vector: nearest code, EMA codebook (section 2.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from v2flow_cli.recipe.schema import Quantizer
from v2flow_cli.runtime.device import without_autocast
from v2flow_cli.runtime.processes import copy_from_first, gather_rows, sum_in_place, world_size
from v2flow_cli.tokenizer.quantizer import QuantizerOutput, TokenQuantizer, perplexity

STATISTICS_RATE = 0.05  # of the running mean and standard deviation, per step


class EMAQuantizer(TokenQuantizer):
    """A codebook (K, D) moved by exponential averages of the vectors that chose each code.

    Vectors are first standardised by running statistics. Silent (S2): the paper does not say how; soft mixtures of
    thousands of words all lie within a narrow cone, where cosines hardly differ and the decoder sees little but
    their mean. One diagonal affine map keeps them in the vocabulary's space (``vectors`` inverts it).
    With ``distance: cosine`` vectors and codes have unit length. During the first ``start_step`` steps nothing is
    quantised: the codebook is a ring buffer of the newest vectors, which ``kmeans_steps`` of k-means then turn into
    means; after that it follows the averages. A codebook initialised before the encoder has learned anything would
    collapse at once. All arithmetic is float32, also under autocast.
    """

    codebook: Tensor
    counts: Tensor
    usage: Tensor
    ring_position: Tensor
    mean: Tensor
    std: Tensor
    averaged_buffers = ("mean", "std")  # averaged together with the weights that produce the vectors

    def __init__(self, settings: Quantizer, code_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("codebook", F.normalize(torch.randn(settings.codebook_size, code_size), dim=-1))
        self.register_buffer("counts", torch.ones(settings.codebook_size))  # running vectors per step
        if settings.usage_decay:
            self.register_buffer("usage", torch.ones(settings.codebook_size))  # as counts, with a faster decay
        self.register_buffer("ring_position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(code_size))
        self.register_buffer("std", torch.ones(code_size))
        # A standardised vector has length sqrt(D) on average; the cosine codebook stores only its direction. The output
        # has the standard scale again: unit vectors would be too small beside the decoder's residuals.
        self.length = code_size**0.5 if settings.distance == "cosine" else 1.0

    def forward(self, vectors: Tensor, step: int | None = None) -> QuantizerOutput:
        """Quantise (B, N, D). ``step`` is the training step, which also updates the codebook; None freezes it."""
        with without_autocast(vectors):
            if step is not None:
                self._follow(vectors.detach().float(), first=step == 0)
            # Copies: the next batch updates the statistics in place, possibly before this one's backward pass.
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
            estimator = rotated_onto if self.settings.gradient == "rotation" else straight_through
            return QuantizerOutput(self.length * estimator(vectors, codes), ids, commit_loss)

    def first_like(self, step: int) -> int:
        start, kmeans_steps = self.settings.start_step, self.settings.kmeans_steps
        if step in (0, start - 1):  # the statistics are initialised; all counts are set to their mean
            return step
        if step >= start:
            return max(start, 1)
        return start - kmeans_steps - 1 if kmeans_steps and start - step <= kmeans_steps + 1 else 1

    @property
    def vectors(self) -> Tensor:
        """The codes (K, D) in the space of the input vectors, before standardisation."""
        return self.codebook * (self.length * self.std) + self.mean

    def embed(self, token_ids: Tensor) -> Tensor:
        """Codes (B, N, D) of token ids (B, N), at the scale of ``QuantizerOutput.embeddings``."""
        return self.length * self.codebook[token_ids]

    def nearest(self, vectors: Tensor) -> Tensor:
        """Ids of the nearest codes, the lowest id where two are equally near."""
        flat = vectors.flatten(0, -2)
        codebook = self.codebook.to(flat.dtype)  # a model that was cast to bf16 has it in bf16
        scores = flat @ codebook.T
        if self.settings.distance == "euclidean":
            scores = scores - 0.5 * codebook.square().sum(-1)
        return scores.argmax(-1).view(vectors.shape[:-1])

    def _prepare(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.settings.distance == "cosine" else vectors

    @torch.no_grad()
    def _follow(self, vectors: Tensor, first: bool) -> None:
        """Move the running mean and standard deviation of each dimension towards this batch's."""
        flat = gather_rows(vectors.flatten(0, -2))
        rate = 1.0 if first else STATISTICS_RATE
        self.mean.lerp_(flat.mean(0), rate)
        self.std.lerp_(flat.std(0).clamp_min(1e-6), rate)

    def _prepare_codebook(self, vectors: Tensor, steps_left: int) -> None:
        """Ring buffer, k-means, running counts: the steps before quantisation, each harmless to repeat within a step.

        Silent (S1): the start of the codebook.
        """
        kmeans_steps = self.settings.kmeans_steps
        if not kmeans_steps or steps_left > kmeans_steps + 1:
            self._fill_ring(vectors)
        elif steps_left > 1:
            self._step_kmeans(vectors)
        if steps_left == 1:  # every code starts with the mean count
            self.counts.fill_(vectors[..., 0].numel() * world_size() / len(self.codebook))
            self._running().copy_(self.counts)

    @torch.no_grad()
    def _fill_ring(self, vectors: Tensor) -> None:
        rows = gather_rows(vectors.flatten(0, -2))[-len(self.codebook) :]
        places = (torch.arange(len(rows), device=rows.device) + self.ring_position) % len(self.codebook)
        self.codebook[places] = rows
        self.ring_position.add_(len(rows)).remainder_(len(self.codebook))

    @torch.no_grad()
    def _step_kmeans(self, vectors: Tensor) -> None:
        """Mini-batch k-means (Sculley 2010): a code is the mean of its first vector and of all that chose it since."""
        # Until quantisation starts a count is the number of vectors in the mean, the ring buffer's included.
        self._move(vectors, self.nearest(vectors), keep=1.0, rate=1.0)

    @torch.no_grad()
    def _update(self, vectors: Tensor, ids: Tensor) -> None:
        """One EMA step, then replacement of unused codes and their EMA state. Silent (S3)."""
        counts = self._move(vectors, ids, keep=self.settings.ema_decay, rate=1 - self.settings.ema_decay)
        if self.settings.usage_decay:
            self.usage.lerp_(counts, 1 - self.settings.usage_decay)
        self._revive(gather_rows(vectors.flatten(0, -2)))

    def _move(self, vectors: Tensor, ids: Tensor, keep: float, rate: float) -> Tensor:
        """Multiply the codes' sums by ``keep`` and add their new vectors times ``rate``; counts (K,) of the vectors.

        Only chosen codes change, so the sums have one row per vector of the batch, not one per code: for 16,384 codes
        of width 4,096 this saves a gigabyte in a training step.
        """
        size, ids = len(self.codebook), ids.flatten()
        all_ids = gather_rows(ids)  # of all processes
        slots = torch.arange(len(all_ids), device=ids.device)
        # Each chosen code gets the slot of the first vector that chose it, the same on every rank.
        slot_of = slots.new_full((size,), len(slots)).scatter_reduce_(0, all_ids, slots, "amin")
        counts = torch.zeros(size, device=ids.device).scatter_add_(0, all_ids, torch.ones_like(all_ids).float())
        sums = vectors.new_zeros(len(slots), vectors.shape[-1])
        sums.index_add_(0, slot_of[ids], vectors.flatten(0, -2))
        sum_in_place(sums)
        # The running sum of a code is codebook * counts, so the code itself is its only state.
        totals = self.codebook[all_ids] * (keep * self.counts[all_ids])[:, None] + rate * sums[slot_of[all_ids]]
        self.counts.mul_(keep).add_(counts, alpha=rate)
        self.codebook[all_ids] = self._prepare(totals / self.counts[all_ids].clamp_min(1e-12)[:, None])
        return counts

    def _running(self) -> Tensor:
        return self.usage if self.settings.usage_decay else self.counts

    def _dead(self) -> Tensor:
        """True (K,) for codes whose running count is below ``revive_after`` of the mean."""
        return self._running() < self.settings.revive_after * self._running().mean()

    def _revive(self, candidates: Tensor) -> None:
        # At most an eighth of the batch per step, so that the new codes come from many batches.
        limit = min(len(self.codebook), max(1, len(candidates) // 8))
        picks = torch.randperm(len(candidates), device=candidates.device)[:limit]
        priority = torch.rand(len(self.codebook), device=candidates.device)
        copy_from_first(picks)
        copy_from_first(priority)
        highest, index = torch.where(self._dead(), priority, -1.0).topk(limit)
        replaced = highest >= 0
        self.codebook[index] = torch.where(replaced[:, None], candidates[picks], self.codebook[index])
        states = (self.counts, self.usage) if self.settings.usage_decay else (self.counts,)
        for state in states:
            state[index] = torch.where(replaced, state.mean(), state[index])

    def statistics(self) -> dict[str, Tensor]:
        """Usage and perplexity of the running counts, and the number of codes that the next step may replace."""
        dead = self._dead().float()
        return {"codebook_usage": 1 - dead.mean(), "perplexity": perplexity(self.counts), "dead_codes": dead.sum()}


def straight_through(vectors: Tensor, codes: Tensor) -> Tensor:
    """The codes (..., D); the gradient is copied to the vectors (..., D)."""
    return vectors + (codes - vectors).detach()


def rotated_onto(vectors: Tensor, codes: Tensor) -> Tensor:
    """The codes (..., D) as rotated and scaled vectors (..., D); the gradient passes through the constant rotation.

    Silent (S10): how gradients pass. A copied gradient is the same for all vectors of a cell; a rotated one depends
    on the angle between vector and code. Source: arXiv 2410.06424, section 4.
    """
    start, end = F.normalize(vectors.detach(), dim=-1), F.normalize(codes, dim=-1)
    middle = F.normalize(start + end, dim=-1)
    reflected = vectors - 2 * (vectors * middle).sum(-1, keepdim=True) * middle
    rotated = reflected + 2 * (vectors * start).sum(-1, keepdim=True) * end
    scale = codes.norm(dim=-1, keepdim=True) / vectors.detach().norm(dim=-1, keepdim=True).clamp_min(1e-6)
    return scale * rotated
