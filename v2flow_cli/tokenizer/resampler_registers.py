"""Latents -> one ordered sequence of tokens: a transformer with registers (FlexTok, arXiv 2502.13967)."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from v2flow_cli.errors import ModelError
from v2flow_cli.recipe.schema import Registers, Resampler
from v2flow_cli.tokenizer.context import Block, RotaryPositions, grid_coordinates, nearby, sines
from v2flow_cli.tokenizer.prefix import sample_lengths
from v2flow_cli.tokenizer.resampler import TokenResampler
from v2flow_cli.tokenizer.resampler_grid import REFERENCE_GRIDS, REFERENCE_PX, GridResampler

# The first 0.5 and steps of 1 / p and 1 / p^2, p^3 = p + 1: the R2 sequence, of which every prefix is evenly spread.
SPREAD = (0.7548776662466927, 0.5698402909980532)


class RegisterResampler(TokenResampler):
    """Registers beside the patches of the latents; their values after the last block are the tokens.

    Patches attend to patches, registers to patches and registers (with ``causal`` to those before them). Their
    order comes from their learned initial values. ``places: centre`` gives all of them the position of the image's
    centre (FlexTok); ``spread`` gives each its own position, so that every prefix covers the image evenly, and adds
    the mean of the patches near it to its initial value, with which a small model learns much sooner. ``grid`` moves
    these positions to the cells of a square grid, one register each. Scaled latents (B, C, h, w) become tokens
    (B, max_tokens, d_v).

    With a ``stem``, the patches and the registers with a position start from the features of a grid resampler, and its
    read-out makes the tokens. The blocks between the two add nothing at first: the tokens are those of the grid, in
    the registers' order, so that training can start from a trained grid resampler (``init_from``).

    Raises:  ValueError if ``places: grid`` has no square number of registers, or a stem no grid of patches.
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
            zeroed = [self.registers, self.place.weight, self.place.bias]
            for block in self.blocks:
                assert isinstance(block, Block)
                zeroed += [x for last in (block.out, block.mlp[-1]) for x in last.parameters()]
            for parameter in zeroed:
                nn.init.zeros_(parameter)
        else:
            self.embed = nn.Linear(in_channels * settings.patch_size**2, width)
            self.norm = nn.LayerNorm(width)
        self.shares = spread_shares(settings.places, settings.max_tokens)

    def _build_stem(self, in_channels: int, pixels_per_latent: int) -> GridResampler:
        settings = self.settings
        side = REFERENCE_PX // self.size_multiple
        if (side, side) not in REFERENCE_GRIDS.values():
            raise ModelError(
                f"resampler.stem is given, but resampler.patch_size {settings.patch_size} makes {side} x {side} "
                f"patches at {REFERENCE_PX} px with this autoencoder; expected 8 x 8 or 16 x 16."
            )
        before, after = settings.stem
        return GridResampler(
            Resampler(settings.hidden_size, (before, after), side * side), in_channels, pixels_per_latent
        )

    def num_tokens(self, height: int, width: int, rate: int = 0) -> int:
        """The number of registers, at every image size."""
        return self.settings.max_tokens

    def prefix_lengths(self, batch: int, device: torch.device) -> Tensor:
        """Nested dropout: how many tokens (B,) each image of a training batch keeps."""
        return sample_lengths(self.settings.nested_dropout, batch, self.settings.max_tokens, device)

    def layout(
        self, height: int, width: int, rows: int, columns: int, device: torch.device, rate: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The second index is 0 everywhere: a register is not divided into patches."""
        tokens = self._coordinates(rows, columns, device)
        zeros = torch.zeros(rows * columns, dtype=torch.int64, device=device)
        if self.settings.places == "centre":  # no register is nearest; every prefix has the first one
            return tokens, zeros, zeros
        patches = grid_coordinates(rows, columns, rows, columns, device)
        return tokens, torch.cdist(patches, tokens).argmin(-1), zeros

    def _coordinates(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Coordinates (max_tokens, 2) of the registers in an image of ``rows`` x ``columns`` patches."""
        return torch.tensor(self.shares, device=device) * torch.tensor([rows, columns], device=device) - 0.5

    def forward(self, latents: Tensor, rate: int = 0) -> Tensor:
        p, device = self.settings.patch_size, latents.device
        rows, columns = latents.shape[-2] // p, latents.shape[-1] // p
        coordinates = grid_coordinates(rows, columns, rows, columns, device)
        tokens = self._coordinates(rows, columns, device)
        centre = coordinates.mean(0)
        angles = self.positions(torch.cat([coordinates - centre, tokens - centre])[None])
        if self.settings.stem:
            x = self.grid.features(latents)
        else:
            x = self.embed(rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))
        registers = self.registers.to(x.dtype).expand(len(latents), -1, -1)
        if self.settings.places != "centre":
            if self.settings.stem:  # the read-out was trained on single patches, not on means of several
                registers = registers + x[:, torch.cdist(tokens, coordinates).argmin(-1)]
            else:
                sources, targets = (c.expand(len(x), -1, -1) for c in (coordinates, tokens))
                registers = registers + nearby(x, sources, targets, torch.ones(len(x), device=device))
        x = torch.cat([x, registers], dim=1) + self.place(sines(angles).to(x.dtype))
        mask = self._attention_mask(rows * columns, device)
        for block in self.blocks:
            x = block(x, angles, x.shape[1], mask=mask)
        x = x[:, rows * columns :]
        return self.grid.readout(x) if self.settings.stem else self.norm(x)

    def _attention_mask(self, patches: int, device: torch.device) -> Tensor:
        """True (L, L) where a position attends to another; patches come first."""
        count = patches + self.settings.max_tokens
        mask = torch.ones(count, count, dtype=torch.bool, device=device)
        mask[:patches, patches:] = False
        if self.settings.causal:
            mask[patches:, patches:] = torch.ones_like(mask[patches:, patches:]).tril()
        return mask


def spread_shares(places: str, count: int) -> list[list[float]]:
    """Positions (count, 2) of registers as shares of height and width, in [0, 1).

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
    for point in spread:  # each takes the nearest free cell
        cells.append(min(free, key=lambda cell: math.dist(cell, point)))
        free.remove(cells[-1])
    return cells
