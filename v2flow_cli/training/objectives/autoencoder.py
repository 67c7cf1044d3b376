"""The loss of an autoencoder: the error of its reconstructions, with noise on the latents."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from v2flow_cli.recipe.schema import AutoencoderRecipe
from v2flow_cli.runtime.device import DTYPES
from v2flow_cli.tokenizer.autoencoder import V2FlowAutoencoder, V2FlowAutoencoderConfig
from v2flow_cli.training.objectives.objective import Objective


class AutoencoderObjective(Objective):
    """Weighted pixel losses, and a running estimate of the latents' mean and standard deviation."""

    latent_mean: Tensor
    latent_square: Tensor
    recipe: AutoencoderRecipe
    size_multiple = 8  # sides of images, in pixels

    def __init__(self, recipe: AutoencoderRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        config = V2FlowAutoencoderConfig(**dataclasses.asdict(recipe.model))
        self.model = V2FlowAutoencoder(config).to(memory_format=torch.channels_last)
        self.register_buffer("latent_mean", torch.zeros(()))
        self.register_buffer("latent_square", torch.ones(()))

    def plan(self, step: int, inputs: dict[str, Tensor], draw: random.Random, coarse: bool = False) -> dict[str, Any]:
        """Further inputs of ``forward``: the step, as a tensor, because a number would be compiled into the graph."""
        return {"step": torch.tensor(float(step))}

    def forward(self, images: Tensor, step: int | Tensor) -> dict[str, Tensor]:
        """Loss terms of a batch (B, 3, S, S); ``loss`` is the total."""
        reconstruction, latents = self.model(images)
        reconstruction = reconstruction.float()
        mse, l1 = F.mse_loss(reconstruction, images), F.l1_loss(reconstruction, images)
        with torch.no_grad():
            rate = torch.as_tensor(1 / (step + 1)).clamp_min(0.01)
            self.latent_mean.add_(rate * (latents.float().mean() - self.latent_mean))
            self.latent_square.add_(rate * (latents.float().square().mean() - self.latent_square))
        weights = self.recipe.loss
        return {
            "loss": weights.mse * mse + weights.l1 * l1,
            "mse": mse.detach(),
            "psnr_db": -10 * torch.log10(mse.detach() / 4),  # images span 2, so the peak power is 4
            "latent_std": (self.latent_square - self.latent_mean**2).sqrt(),
        }

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.model(images)[0]

    def export(self, folder: Path) -> None:
        """Save the model with the latents' statistics as its scale (applied by ``tokenizer/latents.py``)."""
        std = (self.latent_square - self.latent_mean**2).sqrt().item()
        self.model.config.shift_factor = self.latent_mean.item()
        self.model.config.scaling_factor = 1.0 / max(std, 1e-6)
        self.model.to(DTYPES[self.recipe.train.save_dtype]).save_pretrained(folder)
