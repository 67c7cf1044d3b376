"""Prefixes of an ordered token sequence: the lengths in training, and the mask tokens after a prefix (FlexTok)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sample_lengths(kind: str, batch: int, max_tokens: int, device: torch.device) -> Tensor:
    """Nested dropout: how many tokens (B,) each image keeps, in [1, max_tokens].

    ``uniform`` gives every length the same probability, ``power_of_two`` the lengths 1, 2, 4, ... and ``max_tokens``.
    ``mixed`` takes either for each image, the second from 8 tokens on: with the first alone few images have less than
    32 of 256 tokens, with the second few have more than 128. ``none`` keeps all.
    """
    if kind == "none":
        return torch.full((batch,), max_tokens, device=device)
    uniform = torch.randint(1, max_tokens + 1, (batch,), device=device)
    if kind == "uniform":
        return uniform
    # With 1, 2 and 4 among them, one token becomes so good that the second adds little (docs/flextok.md).
    lengths = [n for n in doublings(max_tokens) if kind == "power_of_two" or n >= min(8, max_tokens)]
    powers = torch.tensor(lengths, device=device)[torch.randint(len(lengths), (batch,), device=device)]
    return powers if kind == "power_of_two" else torch.where(torch.rand(batch, device=device) < 0.5, powers, uniform)


def doublings(count: int) -> list[int]:
    """1, 2, 4, ... below ``count``, and ``count``."""
    return sorted({*(2**k for k in range(count.bit_length())), count})


class TokenEmbedding(nn.Linear):
    """Code vectors (B, n, D) to a decoder's width (B, n, W).

    For an ordered sequence of ``max_tokens`` an embedding of the index is added, and every token past an image's
    length becomes one learnable mask token, so that the decoder always reads ``max_tokens`` positions.
    """

    def __init__(self, code_size: int, width: int, max_tokens: int = 0) -> None:
        super().__init__(code_size, width)
        self.max_tokens = max_tokens
        if max_tokens:
            self.order = nn.Parameter(0.02 * torch.randn(max_tokens, width))
            self.mask_token = nn.Parameter(0.02 * torch.randn(width))

    def forward(self, codes: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Codes (B, n, D), of which each image keeps the first ``lengths`` (B,); None: all n."""
        x = super().forward(codes)
        if not self.max_tokens:
            return x
        batch, count, width = x.shape
        if lengths is None:
            lengths = torch.full((batch,), count, device=x.device)
        kept = torch.arange(self.max_tokens, device=x.device) < lengths[:, None]  # (B, max_tokens)
        x = torch.cat([x, x.new_zeros(batch, self.max_tokens - count, width)], dim=1)
        return torch.where(kept[..., None], x, self.mask_token.to(x.dtype)) + self.order.to(x.dtype)
