"""Latents -> one ordered sequence of tokens: a transformer with registers (FlexTok, arXiv 2502.13967)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from v2flow_cli.recipe.schema import Registers
from v2flow_cli.tokenizer.context import Block, RotaryPositions, grid_coordinates, nearby, sines
from v2flow_cli.tokenizer.prefix import sample_lengths

# The first 0.5 and steps of 1 / p and 1 / p^2, p^3 = p + 1: the R2 sequence, of which every prefix is evenly spread.
SPREAD = (0.7548776662466927, 0.5698402909980532)


class RegisterResampler(nn.Module):
    """Registers beside the patches of the latents; what they have become after the last block are the tokens.

    Patches attend to patches, registers to patches and registers (with ``causal`` to those before them). Their
    order is in their learned start. ``places: centre`` sets all of them on the middle of the image, as good as
    nowhere (FlexTok); ``spread`` gives each a place of its own, so that every prefix covers the image evenly, and
    starts it from what lies there, which a small model learns from much sooner. Scaled latents (B, C, h, w)
    become tokens (B, max_tokens, d_v).
    """

    def __init__(self, settings: Registers, in_channels: int, pixels_per_latent: int) -> None:
        super().__init__()
        width = settings.hidden_size
        self.settings = settings
        self.lengths: tuple[int, ...] = (settings.max_tokens,)
        self.ordered = settings.max_tokens
        self.flexible = settings.nested_dropout != "none"
        self.size_multiple = pixels_per_latent * settings.patch_size  # pixels
        self.embed = nn.Linear(in_channels * settings.patch_size**2, width)
        self.place = nn.Linear(width // settings.num_heads, width)
        self.registers = nn.Parameter(torch.randn(settings.max_tokens, width) / width**0.5)
        self.positions = RotaryPositions(width // settings.num_heads)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.depth))
        self.norm = nn.LayerNorm(width)

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
        count = torch.arange(self.settings.max_tokens, device=device) * (self.settings.places == "spread")
        return ((0.5 + count[:, None] * torch.tensor(SPREAD, device=device, dtype=torch.float64)) % 1).float()

    def forward(self, latents: Tensor, rate: int = 0) -> Tensor:
        p, device = self.settings.patch_size, latents.device
        rows, columns = latents.shape[-2] // p, latents.shape[-1] // p
        patches = rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        coordinates = grid_coordinates(rows, columns, rows, columns, device)
        tokens = self._shares(device) * torch.tensor([rows, columns], device=device) - 0.5
        middle = coordinates.mean(0)
        angles = self.positions(torch.cat([coordinates - middle, tokens - middle])[None])
        x, registers = self.embed(patches), self.registers.to(latents.dtype).expand(len(latents), -1, -1)
        if self.settings.places == "spread":
            at, asked = (c.expand(len(x), -1, -1) for c in (coordinates, tokens))
            registers = registers + nearby(x, at, asked, torch.ones(len(x), device=device))
        x = torch.cat([x, registers], dim=1) + self.place(sines(angles).to(x.dtype))
        seen = self._seen(rows * columns, device)
        for block in self.blocks:
            x = block(x, angles, x.shape[1], seen=seen)
        return self.norm(x[:, rows * columns :])

    def _seen(self, patches: int, device: torch.device) -> Tensor:
        """True (L, L) where a position attends to another; patches come first."""
        count = patches + self.settings.max_tokens
        seen = torch.ones(count, count, dtype=torch.bool, device=device)
        seen[:patches, patches:] = False
        if self.settings.causal:
            seen[patches:, patches:] = torch.ones_like(seen[patches:, patches:]).tril()
        return seen
