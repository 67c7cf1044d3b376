"""The interface of every quantizer: vectors to codes and token ids, and ids to codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class QuantizerOutput:
    """``embeddings`` (B, N, D) with gradients for the vectors; ``token_ids`` (B, N) int64; a scalar loss."""

    embeddings: Tensor
    token_ids: Tensor
    commit_loss: Tensor


class TokenQuantizer(nn.Module, ABC):
    """K codes for vectors of width D; built from (its section of the recipe, D)."""

    @abstractmethod
    def forward(self, vectors: Tensor, step: int | None = None) -> QuantizerOutput:
        """Quantise vectors (B, N, D); ``step`` is the training step, None outside training."""

    @abstractmethod
    def embed(self, token_ids: Tensor) -> Tensor:
        """Codes (B, N, D) of token ids (B, N), as ``QuantizerOutput.embeddings``."""

    @property
    @abstractmethod
    def vectors(self) -> Tensor:
        """All codes (K, D) in the space of the input vectors."""

    def first_like(self, step: int) -> int:
        """The first training step with the same computation as ``step``, so that one compiled graph serves both."""
        return 0

    @abstractmethod
    def statistics(self) -> dict[str, Tensor]:
        """``codebook_usage`` in [0, 1] and ``perplexity`` in [1, K] for the log, and others; each a tensor ()."""


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of codes with these counts (K,), a tensor ()."""
    share = counts / counts.sum().clamp_min(1e-12)
    return (-(share * (share + 1e-12).log()).sum()).exp()
