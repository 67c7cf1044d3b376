"""A small convolutional autoencoder, f8: fast enough for a CPU, with latents in which small errors stay small."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.configuration_utils import PretrainedConfig

from v2flow_cli.runtime.device import draw_noise
from v2flow_cli.tokenizer.pretrained import PretrainedModule


class V2FlowAutoencoderConfig(PretrainedConfig):
    """Widths and depths (see ``recipe.schema.AutoencoderModel``) and the statistics of the latents."""

    model_type = "v2flow_autoencoder"

    def __init__(
        self,
        latent_channels: int = 16,
        encoder_width: int = 160,
        encoder_depth: int = 3,
        decoder_width: int = 192,
        decoder_depth: int = 4,
        latent_noise: float = 0.1,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.latent_channels = latent_channels
        self.encoder_width = encoder_width
        self.encoder_depth = encoder_depth
        self.decoder_width = decoder_width
        self.decoder_depth = decoder_depth
        self.latent_noise = latent_noise
        self.scaling_factor = scaling_factor
        self.shift_factor = shift_factor
        super().__init__(**kwargs)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position of (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """x + 1x1(SiLU(3x3(norm(x)))) on (B, C, h, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.spatial = nn.Conv2d(width, width, 3, padding=1)
        self.mix = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.mix.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(F.silu(self.spatial(self.norm(x))))


class V2FlowAutoencoder(PretrainedModule):
    """Images (B, 3, H, W) in [-1, 1] to raw latents (B, C, H/8, W/8) and back; ``latents.py`` applies the scale."""

    config_class = V2FlowAutoencoderConfig
    config: V2FlowAutoencoderConfig
    downsampling = 8

    def __init__(self, config: V2FlowAutoencoderConfig) -> None:
        super().__init__(config)
        c, e, d = config.latent_channels, config.encoder_width, config.decoder_width
        # Most work happens at 1/8 resolution, on convolutions wide enough to be matrix products.
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, e // 2, 3, padding=1),
            ResidualBlock(e // 2),
            nn.Conv2d(e // 2, e, 3, stride=2, padding=1),
            *[ResidualBlock(e) for _ in range(config.encoder_depth)],
            ChannelNorm(e),
            nn.Conv2d(e, c, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(c, d, 3, padding=1),
            *[ResidualBlock(d) for _ in range(config.decoder_depth)],
            nn.Conv2d(d, 2 * d, 1),
            nn.PixelShuffle(2),  # (B, d/2, H/4, W/4)
            ResidualBlock(d // 2),
            ResidualBlock(d // 2),
            nn.Conv2d(d // 2, 48, 3, padding=1),
            nn.PixelShuffle(4),
        )

    def encode(self, images: Tensor) -> Tensor:
        """Raw latents (B, C, H/8, W/8)."""
        return self.encoder(images.contiguous(memory_format=torch.channels_last))

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), not clamped."""
        return self.decoder(latents.contiguous(memory_format=torch.channels_last))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Training pass: (reconstruction, raw latents), with noise on the latents in training mode.

        The noise has the standard deviation ``latent_noise`` relative to the latents' own RMS. With it
        every latent direction has about the same effect in pixels, so that the flow's squared error in latents
        approximates the squared error in the image.
        """
        latents = self.encode(images)
        noisy = latents
        if self.training and self.config.latent_noise:
            rms = latents.float().square().mean().sqrt()
            noisy = latents + self.config.latent_noise * rms * draw_noise(latents)
        return self.decode(noisy), latents
