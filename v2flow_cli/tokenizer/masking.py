"""Which positions are hidden in training, and in what order they are revealed in sampling (section 2.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor


def mask_ratio(minimum: float, std: float, u: float) -> float:
    """The mask ratio at quantile ``u`` in [0, 1) of the normal around 1 with ``std``, truncated to [minimum, 1].

    Silent (S4): the distribution.
    """
    normal = NormalDist(1.0, std)
    lowest = normal.cdf(minimum)
    quantile = lowest + (0.5 - lowest) * u
    return min(1.0, max(minimum, normal.inv_cdf(quantile))) if quantile else minimum


def hidden_patches(ratio: float, positions: int, coarse: bool) -> int:
    """How many of ``positions`` patches are hidden at a mask ratio, at least 1.

    ``coarse`` rounds up to a multiple of an eighth of them, so that few shapes occur and a compiled step is reused.
    """
    hidden = max(1, math.ceil(ratio * positions))
    grain = max(1, positions // 8) if coarse else 1
    return min(positions, math.ceil(hidden / grain) * grain)


def random_orders(batch: int, positions: int, device: torch.device) -> Tensor:
    """An independent random permutation of the positions per image, (B, N) int64."""
    return torch.rand(batch, positions, device=device).argsort(-1)


def seeded_orders(seeds: Sequence[int], positions: int, device: torch.device) -> Tensor:
    """As ``random_orders``, each row from its own seed alone."""
    rows = [torch.randperm(positions, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)


def reveal_schedule(positions: int, rounds: int) -> list[int]:
    """Positions revealed in each of ``rounds`` rounds: the mask ratio falls from 1 to 0 along a cosine.

    Every position is revealed once, and every round reveals at least one while any is left.
    Source: Algorithm 1, line 4.
    """
    rounds = min(rounds, positions)
    counts, hidden = [], positions
    for k in range(1, rounds + 1):
        left = math.floor(positions * math.cos(math.pi / 2 * k / rounds)) if k < rounds else 0
        left = max(rounds - k, min(hidden - 1, left))
        counts.append(hidden - left)
        hidden = left
    return counts


def gather(rows: Tensor, index: Tensor) -> Tensor:
    """The rows (B, M, X) of ``rows`` (B, N, X) at ``index`` (B, M)."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))
