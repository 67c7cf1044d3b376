"""A loss that keeps vectors as far apart as the latents they stand for, so that few codes can cover them well."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def isometry_loss(vectors: Tensor, latents: Tensor, grid: tuple[int, int]) -> Tensor:
    """Squared distance (a scalar in [0, 4]) of vectors (B, n, D) to their own cells of latents (B, C, h, w).

    ``grid`` is the (rows, columns) of the n tokens. Both are compared by their directions from the batch's mean, the
    lifted cells after one fixed random rotation into D dimensions. Departs (D15): the gradient that passes a quantiser
    never asks for what the codes do not tell yet, so vectors settle in the few directions that are learned first, and
    14 bits are wasted on telling those apart ever more finely.

    Raises:  ValueError where the latents do not divide into the grid.
    """
    rows, columns = grid
    if latents.shape[-2] % rows or latents.shape[-1] % columns:
        shape = f"{latents.shape[-2]} x {latents.shape[-1]}"
        raise ValueError(f"{shape} latents do not divide into {rows} x {columns} tokens; set loss.isometry to 0")
    cells = rearrange(latents, "b c (r p) (k q) -> (b r k) (c p q)", r=rows, k=columns).float()
    # Directions forget lengths, and a cell's length is much of its brightness and contrast: one more number of about
    # that length turns long and short cells into different directions.
    lengths = cells.norm(dim=-1, keepdim=True)
    lifted = F.normalize(torch.cat([cells, lengths.square().mean().sqrt().expand_as(lengths)], dim=-1), dim=-1)
    wanted = _directions(lifted @ _rotation(lifted.shape[-1], vectors.shape[-1]).to(lifted))
    return (_directions(vectors.flatten(0, 1).float()) - wanted).square().sum(-1).mean()


def _directions(rows: Tensor) -> Tensor:
    """Rows (M, D), standardised over the batch, at unit length."""
    return F.normalize((rows - rows.mean(0)) / rows.std(0).clamp_min(1e-6), dim=-1)


def _rotation(width: int, out: int) -> Tensor:
    """A matrix (width, out) with orthonormal rows (columns where width > out), the same in every run."""
    draws = torch.randn(max(width, out), min(width, out), generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(draws)[0]
    return basis if width >= out else basis.T
