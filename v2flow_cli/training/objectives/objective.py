"""The interface of every objective that ``training/loop.py`` trains."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from v2flow_cli.recipe.schema import AutoencoderRecipe, TokenizerRecipe


class Objective(nn.Module, ABC):
    """A module whose ``forward`` returns loss terms by name; ``loss`` is minimised, the others are logged."""

    recipe: AutoencoderRecipe | TokenizerRecipe
    size_multiple: Any  # int: image sides must be a multiple of so many pixels

    @abstractmethod
    def plan(self, step: int, inputs: dict[str, Any], draw: random.Random, coarse: bool = False) -> dict[str, Any]:
        """Further inputs of ``forward`` for this step, with the random numbers that the host draws.

        Args:    inputs, of ``forward``: ``images`` (B, 3, H, W), or cached ``latents``; coarse, allow only few shapes,
                 so that a compiled step is reused.
        """

    @abstractmethod
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] through the model and back, for the sample grids."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the model folder."""

    def no_decay(self) -> tuple[str, ...]:
        """The beginnings of the names of parameters without weight decay."""
        return ()

    def statistics(self, step: int) -> dict[str, Tensor]:
        """Further figures for the log, each a tensor (), after ``step`` steps."""
        return {}

    def check(self, step: int, figures: Mapping[str, float]) -> None:
        """Raises: V2FlowError for ``statistics`` with which the training should stop."""
