"""Latents -> visual tokens on a grid (section 2.2)."""

from __future__ import annotations

import itertools
import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from v2flow_cli.recipe.schema import Resampler
from v2flow_cli.tokenizer.context import grid_coordinates, grid_part_index, grid_token_index
from v2flow_cli.tokenizer.reg_stage import RegStage
from v2flow_cli.tokenizer.resampler import TokenResampler

REFERENCE_PX = 256  # token counts are given for images of this side
REFERENCE_GRIDS = {64: (8, 8), 128: (8, 16), 256: (16, 16)}


class GridResampler(TokenResampler):
    """RegStage blocks, a spatial downsampler, RegStage blocks and a read-out MLP, on a grid of tokens.

    Scaled latents (B, C, h, w) become tokens (B, n, d_v), flattened row by row. Where latents are coarser than the
    token grid (f32 latents, 256 tokens at 256 px), a transposed convolution splits each into its tokens.

    ``rate`` selects one of several lengths (Table 2 of the paper, from one model): 0 is ``tokens_per_256px``, 1 and up
    are ``other_tokens_per_256px``. Each has its own downsampler; everything else is shared.

    Raises:  ValueError if neither grid is a whole multiple of the other.
    """

    def __init__(self, settings: Resampler, in_channels: int, pixels_per_latent: int) -> None:
        super().__init__()
        width = settings.hidden_size
        self.lengths = (settings.tokens_per_256px, *settings.other_tokens_per_256px)  # at 256 x 256 pixels, by rate
        self.other_shares = settings.other_shares
        self.size_multiple = REFERENCE_PX // min(REFERENCE_GRIDS[settings.tokens_per_256px])  # pixels
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.before = RegStage(settings.depth[0], width)
        self.downsample, *others = (_downsampler(width, n, REFERENCE_PX // pixels_per_latent) for n in self.lengths)
        if others:
            self.other_downsample = nn.ModuleList(others)
        self.after = RegStage(settings.depth[1], width)
        self.readout = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def token_grid(self, height: int, width: int, rate: int = 0) -> tuple[int, int]:
        """(rows, columns) of tokens for an image of ``height`` x ``width`` pixels."""
        rows, columns = REFERENCE_GRIDS[self.lengths[rate]]
        return height * rows // REFERENCE_PX, width * columns // REFERENCE_PX

    def num_tokens(self, height: int, width: int, rate: int = 0) -> int:
        rows, columns = self.token_grid(height, width, rate)
        return rows * columns

    def rates(self, height: int, width: int) -> list[int]:
        def fits(rate: int) -> bool:
            multiples = (REFERENCE_PX // side for side in REFERENCE_GRIDS[self.lengths[rate]])
            return not any(side % multiple for side, multiple in zip((height, width), multiples))

        return [0, *filter(fits, range(1, len(self.lengths)))]

    def square_side(self, length: int, default: int, multiple: int) -> int | None:
        if length in (self.num_tokens(default, default, rate) for rate in self.rates(default, default)):
            return default
        per_reference = self.num_tokens(REFERENCE_PX, REFERENCE_PX)
        side = round(math.sqrt(length / per_reference) * REFERENCE_PX) if length > 0 else 0
        return side if side and side % multiple == 0 and self.num_tokens(side, side) == length else None

    def rate_at(self, step: int) -> int:
        u = random.Random(step).random()
        ends = itertools.accumulate(self.other_shares)
        return next((rate for rate, end in enumerate(ends, start=1) if u < end), 0)

    def layout(
        self, height: int, width: int, rows: int, columns: int, device: torch.device, rate: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        grids = (*self.token_grid(height, width, rate), rows, columns)
        return grid_coordinates(*grids, device), grid_token_index(*grids, device), grid_part_index(*grids, device)

    def forward(self, latents: Tensor, rate: int = 0) -> Tensor:
        return self.readout(self.features(latents, rate))

    def features(self, latents: Tensor, rate: int = 0) -> Tensor:
        """What the read-out reads (B, n, d_v), row by row."""
        x = self.stem(latents.contiguous(memory_format=torch.channels_last))
        downsample = self.other_downsample[rate - 1] if rate else self.downsample
        x = F.silu(downsample(self.before(x)))
        return self.after(x).flatten(2).transpose(1, 2)


def _downsampler(width: int, tokens: int, side: int) -> nn.Module:
    """From ``side`` x ``side`` latents to the grid of ``tokens``, for an image of 256 x 256 pixels."""
    rows, columns = REFERENCE_GRIDS[tokens]
    merge, split = (side // rows, side // columns), (rows // side, columns // side)
    # Silent (S8): its kind. A strided convolution, as in latent diffusion: an average of neighbours would lose the
    # differences between them.
    if (merge[0] * rows, merge[1] * columns) == (side, side):
        return nn.Conv2d(width, width, merge, stride=merge)
    if (split[0] * side, split[1] * side) == (rows, columns):
        return nn.ConvTranspose2d(width, width, split, stride=split)
    raise ValueError(f"{side} x {side} latents do not divide into {rows} x {columns} tokens at 256 px")
