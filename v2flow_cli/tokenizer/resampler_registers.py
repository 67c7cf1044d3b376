"""Latents -> one ordered sequence of tokens: a transformer with registers (FlexTok, arXiv 2502.13967)."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from v2flow_cli.recipe.schema import Registers, Resampler
from v2flow_cli.tokenizer.context import Block, RotaryPositions, grid_coordinates, nearby, sines
from v2flow_cli.tokenizer.prefix import sample_lengths
from v2flow_cli.tokenizer.resampler_grid import REFERENCE_GRIDS, REFERENCE_PX, GridResampler

# The first 0.5 and steps of 1 / p and 1 / p^2, p^3 = p + 1: the R2 sequence, of which every prefix is evenly spread.
SPREAD = (0.7548776662466927, 0.5698402909980532)


class RegisterResampler(nn.Module):
    """Registers beside the patches of the latents; what they have become after the last block are the tokens.

    Patches attend to patches, registers to patches and registers (with ``causal`` to those before them). Their
    order is in their learned start. ``places: centre`` sets all of them on the middle of the image, as good as
    nowhere (FlexTok); ``spread`` gives each a place of its own, so that every prefix covers the image evenly, and
    starts it from what lies there, which a small model learns from much sooner. ``grid`` moves these places to the
    cells of a square grid, one register each. Scaled latents (B, C, h, w) become tokens (B, max_tokens, d_v).

    With a ``stem`` the patches, and the registers with a place, start from the features of a grid resampler, whose
    read-out makes the tokens. The blocks between the two add nothing at first: tokens then are those of that grid, in
    the registers' order, so that a trained grid resampler is a start (``init_from``).

    Raises:  ValueError where ``places: grid`` has no square number of registers, or a stem no grid of patches.
    """

    def __init__(self, settings: Registers, in_channels: int, pixels_per_latent: int) -> None:
        super().__init__()
        width = settings.hidden_size
        self.settings = settings
        self.lengths: tuple[int, ...] = (settings.max_tokens,)
        self.ordered = settings.max_tokens
        self.flexible = settings.nested_dropout != "none"
        self.size_multiple = pixels_per_latent * settings.patch_size  # pixels
        self.place = nn.Linear(width // settings.num_heads, width)
        self.registers = nn.Parameter(torch.randn(settings.max_tokens, width) / width**0.5)
        self.positions = RotaryPositions(width // settings.num_heads)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.depth))
        if settings.stem:
            self.grid = self._build_stem(in_channels, pixels_per_latent)
            started = [self.registers, self.place.weight, self.place.bias]
            for block in self.blocks:
                assert isinstance(block, Block)
                started += [x for last in (block.out, block.mlp[-1]) for x in last.parameters()]
            for parameter in started:
                nn.init.zeros_(parameter)
        else:
            self.embed = nn.Linear(in_channels * settings.patch_size**2, width)
            self.norm = nn.LayerNorm(width)
        self.shares = spread_shares(settings.places, settings.max_tokens)

    def _build_stem(self, in_channels: int, pixels_per_latent: int) -> GridResampler:
        settings = self.settings
        side = REFERENCE_PX // self.size_multiple
        if (side, side) not in REFERENCE_GRIDS.values():
            raise ValueError(f"a stem has 8 x 8 or 16 x 16 patches at {REFERENCE_PX} px, not {side} x {side}")
        before, after = settings.stem
        return GridResampler(
            Resampler(settings.hidden_size, (before, after), side * side), in_channels, pixels_per_latent
        )

    def num_tokens(self, height: int, width: int, rate: int = 0) -> int:
        """Tokens of an image of ``height`` x ``width`` pixels: as many as there are registers, whatever the size."""
        return self.settings.max_tokens

    def rates(self, height: int, width: int) -> list[int]:
        """One rate: shorter sequences are prefixes."""
        return [0]

    def rate_at(self, step: int) -> int:
        return 0

    def prefix_lengths(self, batch: int, device: torch.device) -> Tensor:
        """Nested dropout: how many tokens (B,) each image of a training batch keeps."""
        return sample_lengths(self.settings.nested_dropout, batch, self.settings.max_tokens, device)

    def places(
        self, height: int, width: int, rows: int, columns: int, device: torch.device, rate: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``GridResampler.places``; no patch is a part of a token, and there is one rate."""
        tokens = self._shares(device) * torch.tensor([rows, columns], device=device) - 0.5
        parts = torch.zeros(rows * columns, dtype=torch.int64, device=device)
        if self.settings.places == "centre":  # no token owns a place; the first, which every prefix has, stands for all
            return tokens, parts, parts
        patches = grid_coordinates(rows, columns, rows, columns, device)
        return tokens, torch.cdist(patches, tokens).argmin(-1), parts

    def _shares(self, device: torch.device) -> Tensor:
        """Places of the registers as shares of height and width, (max_tokens, 2) in [0, 1)."""
        return torch.tensor(self.shares, device=device)

    def forward(self, latents: Tensor, rate: int = 0) -> Tensor:
        p, device = self.settings.patch_size, latents.device
        rows, columns = latents.shape[-2] // p, latents.shape[-1] // p
        coordinates = grid_coordinates(rows, columns, rows, columns, device)
        tokens = self._shares(device) * torch.tensor([rows, columns], device=device) - 0.5
        middle = coordinates.mean(0)
        angles = self.positions(torch.cat([coordinates - middle, tokens - middle])[None])
        if self.settings.stem:
            x = self.grid.features(latents)
        else:
            x = self.embed(rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))
        registers = self.registers.to(x.dtype).expand(len(latents), -1, -1)
        if self.settings.places != "centre":
            if self.settings.stem:  # a mean of neighbours would not be what the read-out was trained on
                registers = registers + x[:, torch.cdist(tokens, coordinates).argmin(-1)]
            else:
                at, asked = (c.expand(len(x), -1, -1) for c in (coordinates, tokens))
                registers = registers + nearby(x, at, asked, torch.ones(len(x), device=device))
        x = torch.cat([x, registers], dim=1) + self.place(sines(angles).to(x.dtype))
        seen = self._seen(rows * columns, device)
        for block in self.blocks:
            x = block(x, angles, x.shape[1], seen=seen)
        x = x[:, rows * columns :]
        return self.grid.readout(x) if self.settings.stem else self.norm(x)

    def _seen(self, patches: int, device: torch.device) -> Tensor:
        """True (L, L) where a position attends to another; patches come first."""
        count = patches + self.settings.max_tokens
        seen = torch.ones(count, count, dtype=torch.bool, device=device)
        seen[:patches, patches:] = False
        if self.settings.causal:
            seen[patches:, patches:] = torch.ones_like(seen[patches:, patches:]).tril()
        return seen


def spread_shares(places: str, count: int) -> list[list[float]]:
    """Places (count, 2) of registers as shares of height and width, in [0, 1).

    Raises:  ValueError for a grid of ``count`` cells that is not square.
    """
    if places == "centre":
        return [[0.5, 0.5]] * count
    spread = [[(0.5 + i * step) % 1 for step in SPREAD] for i in range(count)]
    if places == "spread":
        return spread
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"places: grid needs a square number of registers, not {count}")
    free = [[(y + 0.5) / side, (x + 0.5) / side] for y in range(side) for x in range(side)]
    cells = []
    for point in spread:  # the nearest cell that is left
        cells.append(min(free, key=lambda cell: math.dist(cell, point)))
        free.remove(cells[-1])
    return cells
