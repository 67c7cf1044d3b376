"""Masked transformer encoder-decoder: tokens and visible patches -> context of the hidden patches (section 2.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from v2flow_cli.recipe.schema import Context, FlowTransformer, Registers
from v2flow_cli.tokenizer.prefix import TokenEmbedding

ROTARY_BASE = 100.0  # longest wavelength about 600 positions
PLAIN_LONGEST = 512  # positions; the memory of plain attention grows with their square


class RotaryPositions(nn.Module):
    """2D rotary positions: half of each head turns with the row, half with the column. Silent (S5).

    Coordinates are in patches, so one model takes any image size.
    """

    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.pairs = head_size // 4

    def forward(self, coordinates: Tensor) -> Tensor:
        """Angles (B, 1, L, head_size / 2) of coordinates (B, L, 2)."""
        frequencies = ROTARY_BASE ** (-torch.arange(self.pairs, device=coordinates.device) / self.pairs)
        return (coordinates[..., None].float() * frequencies).flatten(-2)[:, None]


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs of (B, heads, L, head_size) by ``angles`` (B, 1, L, head_size / 2)."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def sines(angles: Tensor) -> Tensor:
    """Cosines and sines (B, L, head_size) of ``RotaryPositions`` (B, 1, L, head_size / 2): a position's features."""
    return torch.cat([angles.cos(), angles.sin()], dim=-1)[:, 0]


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention (B, heads, Q, D) of queries (B, heads, Q, D) to keys and values (B, heads, K, D).

    ``mask`` (Q, K): True where a query attends to a key.

    On a CPU PyTorch's fused function is no faster in bf16 than in float32. Plain products are, so short sequences are
    trained with them.
    """
    trained = query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad
    if not trained or max(query.shape[-2], key.shape[-2]) > PLAIN_LONGEST:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(value.dtype) @ value


class Block(nn.Module):
    """Pre-norm attention and MLP in which every position may attend to the first ``known`` positions.

    Departs (D8): nothing attends to the hidden positions (those after ``known``), because they hold mask tokens and no
    data. The result at a position therefore does not depend on which other hidden positions are computed.
    """

    def __init__(self, settings: Context | Registers | FlowTransformer) -> None:
        super().__init__()
        width = settings.hidden_size
        self.heads, self.dropout = settings.num_heads, settings.dropout
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        inner = int(width * settings.mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width))

    def forward(self, x: Tensor, angles: Tensor, known: int, skip: int = 0, mask: Tensor | None = None) -> Tensor:
        """(B, L, W) -> (B, L - skip, W): the first ``skip`` positions are only keys and values.

        ``mask`` (L, L): True where one position attends to another, among the ``known`` ones.
        """
        y = self.attend(self.norm_attention(x), angles, known, skip, mask)
        x = x[:, skip:] + self.drop(y)
        return x + self.drop(self.mlp(self.norm_mlp(x)))

    def attend(self, h: Tensor, angles: Tensor, known: int, skip: int = 0, mask: Tensor | None = None) -> Tensor:
        """Attention (B, L - skip, W) of the normed positions (B, L, W) after ``skip`` to the first ``known``."""
        query = rotate(self._split(self.query(h[:, skip:])), angles[:, :, skip:])
        key, value = self.key_value(h[:, :known]).chunk(2, dim=-1)
        key, value = rotate(self._split(key), angles[:, :, :known]), self._split(value)
        mask = None if mask is None else mask[skip:, :known]
        y = attention(query, key, value, mask)
        return self.out(y.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, head_size)

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class MaskedTransformer(nn.Module):
    """Encoder over quantised tokens and visible patches; decoder over these and the mask tokens.

    Args:    token_size, width of a codebook vector; patch_size, numbers in a latent patch; max_tokens, of an
             ordered sequence, 0 for a grid; other_parts, patches a token at each rate of the resampler but the first.
    """

    def __init__(
        self,
        settings: Context,
        token_size: int,
        patch_size: int,
        max_tokens: int = 0,
        other_parts: Sequence[int] = (),
    ) -> None:
        super().__init__()
        width = settings.hidden_size
        self.embed_token = TokenEmbedding(token_size, width, max_tokens)
        self.embed_patch = nn.Linear(patch_size, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.dummy_token = nn.Parameter(0.02 * torch.randn(width))  # D of Eq. 7; Departs (D10): one token
        self.positions = RotaryPositions(width // settings.num_heads)
        if other_parts:
            self.rate_embedding = nn.Parameter(torch.zeros(len(other_parts), width))
            self.split = nn.ModuleList(nn.Linear(width, parts * width) for parts in other_parts)
            for linear in self.split:
                assert isinstance(linear, nn.Linear)
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)
        self.encoder = nn.ModuleList(Block(settings) for _ in range(settings.encoder_depth))
        self.decoder = nn.ModuleList(Block(settings) for _ in range(settings.decoder_depth))
        self.norm_encoder, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(
        self,
        tokens: Tensor | None,
        token_coordinates: Tensor | None,
        patches: Tensor,
        patch_coordinates: Tensor,
        hidden_coordinates: Tensor,
        token_index: Tensor,
        lengths: Tensor | None = None,
        part_index: Tensor | None = None,
        rate: int = 0,
    ) -> Tensor:
        """Context (B, M, W) of M hidden positions.

        Args:    tokens (B, n, D), or None for the dummy D; token_coordinates (B, n, 2), in patches;
                 patches (B, v, P), the visible ones; their coordinates (B, v, 2); hidden_coordinates (B, M, 2);
                 token_index (B, M), the token in whose cell each hidden position lies;
                 lengths (B,), how many tokens of an ordered sequence each image keeps (default: all n);
                 part_index (B, M), of each hidden position among the patches of its token; rate, the resampler's.
        """
        batch = len(hidden_coordinates)
        if tokens is None or token_coordinates is None:
            start = self.dummy_token.expand(batch, 1, -1)
            start_coordinates = hidden_coordinates.float().mean(1, keepdim=True)
        else:
            start, start_coordinates = self.embed_token(tokens, lengths), token_coordinates
            if rate:
                start = start + self.rate_embedding[rate - 1].to(start.dtype)
        known = torch.cat([start, self.embed_patch(patches)], dim=1)
        coordinates = torch.cat([start_coordinates.float(), patch_coordinates.float()], dim=1)
        angles = self.positions(coordinates)
        for block in self.encoder:
            known = block(known, angles, known.shape[1])
        count = known.shape[1]
        known = self.norm_encoder(known)
        # Departs (D9): a mask token starts from the encoded token of its own cell, so that the decoder does not first
        # have to learn to attend to that token. Under the dummy D it starts from D.
        cells = token_index if tokens is not None else torch.zeros_like(token_index)
        own = known.gather(1, cells[..., None].expand(-1, -1, known.shape[-1]))
        if rate and tokens is not None and part_index is not None:
            # A token that covers several patches needs a different projection for each of them.
            projections = self.split[rate - 1](known[:, : tokens.shape[1]])  # (B, n, parts * W)
            parts = projections.shape[-1] // known.shape[-1]
            index = cells * parts + part_index
            own = own + projections.unflatten(-1, (parts, -1)).flatten(1, 2).gather(1, index[..., None].expand_as(own))
        x = torch.cat([known, own + self.mask_token.to(known.dtype)], dim=1)
        angles = torch.cat([angles, self.positions(hidden_coordinates)], dim=2)
        for block in self.decoder[:-1]:
            x = block(x, angles, count)
        x = self.decoder[-1](x, angles, count, skip=count)
        return self.norm_out(x)


def nearby(values: Tensor, sources: Tensor, targets: Tensor, area: Tensor, known: Tensor | None = None) -> Tensor:
    """Means (B, M, W) of ``values`` (B, n, W) at ``sources`` (B, n, 2), weighted by their distance to ``targets``.

    Args:    targets (B, M, 2), coordinates; area (B,), in squared patches, the width of the Gaussian weights;
             known (B, n), True for values that count.
    """
    logits = -torch.cdist(targets.float(), sources.float()).square() / area[:, None, None]
    if known is not None:
        logits = logits.masked_fill(~known[:, None], float("-inf"))
    return logits.softmax(-1).to(values.dtype) @ values


def grid_token_index(rows: int, columns: int, height: int, width: int, device: torch.device) -> Tensor:
    """For each of ``height`` x ``width`` patches the index (height * width,) of the grid cell it lies in."""
    y = torch.arange(height, device=device) * rows // height
    x = torch.arange(width, device=device) * columns // width
    return (y[:, None] * columns + x).flatten()


def grid_part_index(rows: int, columns: int, height: int, width: int, device: torch.device) -> Tensor:
    """For each of ``height`` x ``width`` patches its index (height * width,) among the patches of its grid cell."""
    tall, wide = height // rows, width // columns
    y = torch.arange(height, device=device) % max(1, tall)
    x = torch.arange(width, device=device) % max(1, wide)
    return (y[:, None] * max(1, wide) + x).flatten()


def grid_coordinates(rows: int, columns: int, height: float, width: float, device: torch.device) -> Tensor:
    """Centres (rows * columns, 2) of the cells of a grid laid over ``height`` x ``width`` patches."""
    y = (torch.arange(rows, device=device) + 0.5) * (height / rows) - 0.5
    x = (torch.arange(columns, device=device) + 0.5) * (width / columns) - 0.5
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)
