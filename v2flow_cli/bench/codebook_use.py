"""Codebook usage of token ids, and their bits and bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CodebookFigures:
    """Codebook usage and bits of the token ids of all images."""

    codebook_size: int  # K
    tokens: int  # ids counted, the most codes that could be used
    distinct: int
    usage: float  # distinct / K, in [0, 1]
    perplexity: float  # exp of the entropy, in [1, K]
    entropy_bits: float  # bits a token under the ideal order-0 code of these ids; log2 K if all are equally likely
    adaptive_bits: float  # bits a token under an adaptive code without prior knowledge


class CodebookCounter:
    """Counts token ids over batches."""

    def __init__(self, codebook_size: int) -> None:
        self._counts = torch.zeros(codebook_size, dtype=torch.int64)

    def add(self, token_ids: Tensor) -> None:
        """Count ``token_ids``, integers in [0, K) of any shape."""
        self._counts += torch.bincount(token_ids.flatten().cpu(), minlength=len(self._counts))

    def share(self, total: Callable[[Sequence[int]], list[int]]) -> None:
        """Sum the counts of all ranks with ``total``."""
        self._counts = torch.tensor(total(self._counts.tolist()))

    def figures(self) -> CodebookFigures:
        """Usage, perplexity and bits of all ids so far (at least one).

        For few ids the entropy is too low, because it does not count the code table; the adaptive code
        (Krichevsky-Trofimov: each code starts at count 1/2) includes it, so the true value lies between the two.
        """
        total, size = int(self._counts.sum()), len(self._counts)
        p = self._counts[self._counts > 0].double() / total
        entropy = abs(float(-(p * p.log()).sum()))  # nats; abs: a single code gives -0.0
        half = torch.tensor(0.5).double()
        code = torch.lgamma(total + size * half) - torch.lgamma(size * half)  # nats, for any order of the ids
        code = code - (torch.lgamma(self._counts + half) - torch.lgamma(half)).sum()
        bits = entropy / math.log(2), float(code) / total / math.log(2)
        return CodebookFigures(size, total, len(p), len(p) / size, math.exp(entropy), *bits)


def bits_per_pixel(bytes_per_image: float, pixels: float) -> float:
    """Bits per pixel of an image of ``pixels`` pixels in ``bytes_per_image``."""
    return 8 * bytes_per_image / pixels


def token_bytes(tokens_per_image: int, codebook_size: int) -> int:
    """Bytes of ``tokens_per_image`` ids of ceil(log2 K) bits: 448 for 256 ids of 16,384 codes."""
    return math.ceil(tokens_per_image * max(1, math.ceil(math.log2(codebook_size))) / 8)
