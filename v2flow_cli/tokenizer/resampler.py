"""What every resampler offers: latents to tokens, and how many tokens an image has."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class TokenResampler(Protocol):
    """Scaled latents (B, C, h, w) to tokens (B, n, d_v).

    A resampler may have several ``rates``, numbers of tokens for the same image; 0 is the default one.
    """

    size_multiple: int  # pixels; image sides must be multiples of it
    lengths: tuple[int, ...]  # tokens of a 256 x 256 image by rate; registers: of any image
    ordered: int  # longest ordered sequence; 0 where tokens lie on a grid
    flexible: bool  # every prefix of an image's tokens decodes

    def __call__(self, latents: Tensor, rate: int = 0) -> Tensor: ...

    def num_tokens(self, height: int, width: int, rate: int = 0) -> int:
        """Tokens of an image of ``height`` x ``width`` pixels."""
        ...

    def rates(self, height: int, width: int) -> list[int]:
        """The rates at which such an image divides into whole tokens, 0 first."""
        ...

    def rate_at(self, step: int) -> int:
        """The rate that training step ``step`` trains."""
        ...

    def prefix_lengths(self, batch: int, device: torch.device) -> Tensor | None:
        """How many tokens (B,) each image of a training batch keeps; None where it keeps all."""
        ...

    def places(
        self, height: int, width: int, rows: int, columns: int, device: torch.device, rate: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates of the tokens (n, 2), each patch's token (N,), and which of that token's patches it is (N,)."""
        ...
