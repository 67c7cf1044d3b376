"""The interface of every resampler: latents to tokens, and how many tokens an image has."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class TokenResampler(nn.Module, ABC):
    """Scaled latents (B, C, h, w) to tokens (B, n, d_v).

    A resampler may have several rates, each with its own number of tokens for the same image; rate 0 is the default.
    """

    size_multiple: int  # pixels; image sides must be multiples of it
    lengths: tuple[int, ...]  # by rate: tokens of a 256 x 256 image (grid), or of any image (registers)
    ordered: int = 0  # longest ordered sequence; 0 where tokens lie on a grid
    flexible: bool = False  # True if every prefix of an image's tokens decodes

    @abstractmethod
    def num_tokens(self, height: int, width: int, rate: int = 0) -> int:
        """Tokens of an image of ``height`` x ``width`` pixels."""

    def rates(self, height: int, width: int) -> list[int]:
        """The rates at which such an image divides into whole tokens, 0 first."""
        return [0]

    def rate_of(self, length: int, height: int, width: int) -> int:
        """The rate at which such an image has ``length`` tokens; 0 if any prefix decodes."""
        if self.flexible:
            return 0
        return next(rate for rate in self.rates(height, width) if self.num_tokens(height, width, rate) == length)

    def square_side(self, length: int, default: int, multiple: int) -> int | None:
        """Side in pixels of the square image with ``length`` tokens, a multiple of ``multiple``; None if none has them.

        An ordered sequence does not determine the size: it is ``default``.
        """
        return default

    def rate_at(self, step: int) -> int:
        """The rate that training step ``step`` trains, the same on every rank and after a resume."""
        return 0

    def prefix_lengths(self, batch: int, device: torch.device) -> Tensor | None:
        """How many tokens (B,) each image of a training batch keeps; None if it keeps all."""
        return None

    @abstractmethod
    def layout(
        self, height: int, width: int, rows: int, columns: int, device: torch.device, rate: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where the tokens of an image of ``rows`` x ``columns`` patches lie.

        Returns: coordinates of the tokens (n, 2) in patches, the index of each patch's token (N,), and the index of
                 each patch among the patches of its token (N,).
        """
