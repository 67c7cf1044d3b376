"""Visual tokens -> soft mixtures of LLM words (section 2.2, Eq. 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from v2flow_cli.recipe.schema import Vocabulary

LOGITS_AT_ONCE = 2**24  # entries of one chunk of tokens, 64 MiB in float32
WHITENING_FLOOR = 1e-4  # of the mean variance
VOCAB_CHUNK = 8192  # vocabulary rows scored at a time in top-k mixing


@dataclass(frozen=True)
class VocabularyOutput:
    """``embeddings`` (B, N, D) are the mixtures v; ``mean_entropy`` and ``batch_entropy`` are in nats."""

    embeddings: Tensor
    mean_entropy: Tensor  # of each token's own distribution, averaged
    batch_entropy: Tensor  # of the distribution averaged over the batch


class VocabularyProjection(nn.Module):
    """The generator G, the Gumbel-softmax over the frozen vocabulary L, and v = alpha L (Eq. 4).

    ``table`` holds (L - mean) / rms: because alpha sums to 1, a mixture of these rows is the mixture of the
    LLM's own rows after one fixed affine map, so v stays in the LLM's vocabulary space, and the mean that all rows
    share does not dominate cosine distances. With ``whiten`` the map also gives the rows unit covariance.
    Departs (D6): in an LLM's table a few directions dominate (in our small LM one has 70% of the variance);
    mixtures of such rows vary along two or three directions, too few for 14 bits. ``codebook_to_llm`` inverts the map.

    Departs (D4): the ``tied`` generator scores a word by the cosine of its row and the projected token.
    """

    table: Tensor
    table_mean: Tensor
    table_rms: Tensor
    unwhiten: Tensor

    def __init__(self, settings: Vocabulary, token_size: int, vocab_size: int, embedding_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("table", torch.zeros(vocab_size, embedding_size))
        self.register_buffer("table_mean", torch.zeros(embedding_size))
        self.register_buffer("table_rms", torch.ones(()))
        if settings.whiten:
            self.register_buffer("unwhiten", torch.eye(embedding_size))
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
        table = (rows - mean) / rms
        if self.settings.whiten:
            variances, directions = torch.linalg.eigh((table.T @ table / len(table)).double())
            # The floor limits the amplification of directions in which the words hardly differ.
            deviations = variances.clamp_min(0).add(WHITENING_FLOOR * variances.mean()).sqrt()
            self.unwhiten.copy_((directions * deviations) @ directions.T)
            table = table @ ((directions / deviations) @ directions.T).to(table)
        self.table.copy_(table)
        self.table_mean.copy_(mean)
        self.table_rms.copy_(rms)

    def codebook_to_llm(self, codebook: Tensor) -> Tensor:
        """Codes (K, D) in the embedding space of the LLM: the inverse of the affine map of ``table``."""
        if self.settings.whiten:
            codebook = codebook @ self.unwhiten
        return codebook * self.table_rms + self.table_mean

    def forward(self, tokens: Tensor, noise_scale: float | Tensor = 0.0, entropies: bool = True) -> VocabularyOutput:
        """Mixtures v (B, N, D) of tokens (B, N, d_v); ``noise_scale`` 0 is deterministic, 1 is Eq. 4.

        Without ``entropies``, which only a training needs, both are 0.

        Departs (D5): the noise has a factor, which training raises from 0 and which is 0 in ``encode``.

        With a large vocabulary the tokens are processed in chunks, whose logits are recomputed in the backward pass,
        and no second table (rows of unit length, or of another type) is stored: memory is that of one chunk.
        """
        flat = tokens.flatten(0, -2)
        # The product divided by the row's length is the cosine, without a table of unit rows.
        lengths = self.table.norm(dim=-1).clamp_min(1e-12)
        tied_top_k = self.settings.top_k and self.settings.generator == "tied"  # never stores all logits at once
        mix = self._mix_top_k if self.settings.top_k else self._mix_all
        chunks = [flat] if tied_top_k else flat.split(max(1, LOGITS_AT_ONCE // len(self.table)))
        if len(chunks) > 1 and torch.is_grad_enabled():
            parts = [checkpoint(mix, chunk, lengths, noise_scale, entropies, use_reentrant=False) for chunk in chunks]
        else:
            parts = [mix(chunk, lengths, noise_scale, entropies) for chunk in chunks]
        embeddings = torch.cat([part.embeddings for part in parts]).view(*tokens.shape[:-1], -1)
        batch_entropy = embeddings.new_zeros(())
        if entropies and not self.settings.top_k:  # it needs the whole vocabulary
            average = torch.stack([part.mass for part in parts]).sum(0) / len(flat)
            batch_entropy = -(average * (average + 1e-9).log()).sum()
        mean_entropy = torch.stack([part.entropy for part in parts]).sum() / len(flat)
        return VocabularyOutput(embeddings, mean_entropy, batch_entropy)

    def _mix_all(self, tokens: Tensor, lengths: Tensor, noise_scale: float | Tensor, entropies: bool) -> _Mixtures:
        logits = self.generator(tokens)
        table = self.table.to(logits.dtype)  # under autocast one copy; autocast itself would make two
        if self.settings.generator == "tied":
            logits = (F.normalize(logits, dim=-1) @ table.T) * (self.log_scale.exp() / lengths)
        probs, entropy = self._soft_categorical(logits, noise_scale, entropies)
        mass = probs.sum(0, dtype=torch.float32) if entropies else probs.new_zeros(())
        return _Mixtures(probs.to(table.dtype) @ table, mass, entropy)

    def _mix_top_k(self, tokens: Tensor, lengths: Tensor, noise_scale: float | Tensor, entropies: bool) -> _Mixtures:
        """Departs (D7): mixtures of each token's ``top_k`` best words; the others have no weight."""
        k = min(self.settings.top_k, len(self.table))
        projected = self.generator(tokens)
        if self.settings.generator == "free":
            logits, index = projected.topk(k, dim=-1)
        else:
            cosines, index = NearestWords.apply(F.normalize(projected, dim=-1), self.table, lengths, k)
            logits = self.log_scale.exp() * cosines
        probs, entropy = self._soft_categorical(logits, noise_scale, entropies)
        mixtures = _weighted_rows(self.table, index, probs)
        return _Mixtures(mixtures.to(projected.dtype), probs.new_zeros(()), entropy)

    def _soft_categorical(self, logits: Tensor, noise_scale: float | Tensor, entropies: bool) -> tuple[Tensor, Tensor]:
        """alpha of Eq. 4 (M, k), and the sum of the entropies of its rows in nats, or 0."""
        if isinstance(noise_scale, Tensor) or noise_scale:
            # -log of an exponential variate is a Gumbel variate, with one logarithm per entry.
            logits = logits - noise_scale * torch.empty_like(logits).exponential_().log_()
        if not entropies:
            return F.softmax(logits / self.settings.temperature, dim=-1), logits.new_zeros(())
        log_probs = F.log_softmax(logits / self.settings.temperature, dim=-1)
        probs = log_probs.exp()
        return probs, -(probs.detach() * log_probs.detach()).sum()


class _Mixtures(NamedTuple):
    """Results of one chunk of tokens: mixtures (M, D), each word's total weight (V,), and the sum of the entropies."""

    embeddings: Tensor
    mass: Tensor
    entropy: Tensor


class NearestWords(torch.autograd.Function):
    """Cosines (M, k) of unit vectors (M, D) with their k nearest rows of a frozen table (V, D), and these rows' ids.

    Neither pass stores all M x V cosines, or the M x k rows.
    """

    @staticmethod
    def forward(ctx: Any, unit: Tensor, table: Tensor, lengths: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best, index = unit.new_zeros(len(unit), 0), torch.zeros(len(unit), 0, dtype=torch.int64, device=unit.device)
        for start in range(0, len(table), VOCAB_CHUNK):
            rows = table[start : start + VOCAB_CHUNK].to(unit.dtype)
            cosines = (unit @ rows.T) / lengths[start : start + VOCAB_CHUNK]
            values, ids = cosines.topk(min(k, len(rows)), dim=-1)
            values, ids = torch.cat([best, values], -1), torch.cat([index, ids + start], -1)
            best, order = values.topk(min(k, values.shape[-1]), dim=-1)
            index = ids.gather(-1, order)
        ctx.save_for_backward(table, lengths, index)
        ctx.mark_non_differentiable(index)
        return best, index

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        table, lengths, index = ctx.saved_tensors
        gradient = _weighted_rows(table, index, gradients[0] / lengths[index])
        return gradient.to(gradients[0].dtype), None, None, None


def _weighted_rows(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Sums (M, D) of the rows ``index`` (M, k) of ``table``, weighted, without a copy of the M x k rows."""
    return F.embedding_bag(index, table, per_sample_weights=weights.to(table.dtype), mode="sum")
