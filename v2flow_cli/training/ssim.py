"""Structural similarity as a loss term: float32, and separable, so that a pixel costs 22 products instead of 121."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from v2flow_cli.runtime.device import without_autocast

TAPS, SIGMA = 11, 1.5  # pixels: the Gaussian window of the SSIM paper
K1, K2 = 0.01, 0.03  # its stabilising constants, for pixels that span 1


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Mean SSIM (a scalar) of images (B, C, H, W) whose pixels span 1; borders are mirrored.

    It is computed in float32 also under autocast: variances are differences E[x^2] - E[x]^2 of nearly equal numbers,
    for which bf16 is too coarse (0.63 became 0.41, and its gradient was off by 40%).

    Source: Wang et al. 2004, as torchmetrics computes it.
    """
    with without_autocast(images):
        x, y = images.float(), reference.float()
        moments = torch.cat([x, y, x * x, y * y, x * y])  # (5 B, C, H, W)
        half, channels = TAPS // 2, x.shape[1]
        steps = torch.arange(TAPS, device=x.device, dtype=torch.float32) - half
        window = torch.softmax(-0.5 * (steps / SIGMA).square(), 0).expand(channels, 1, 1, TAPS)
        # Channels last, because on a CPU grouped convolutions are then ten times faster.
        moments = F.pad(moments, (half,) * 4, mode="reflect").contiguous(memory_format=torch.channels_last)
        moments = F.conv2d(F.conv2d(moments, window, groups=channels), window.mT, groups=channels)
        mean_x, mean_y, square_x, square_y, product = moments.chunk(5)
        variance_x = (square_x - mean_x.square()).clamp_min(0)
        variance_y = (square_y - mean_y.square()).clamp_min(0)
        covariance = product - mean_x * mean_y
        similar = (2 * mean_x * mean_y + K1**2) * (2 * covariance + K2**2)
        scale = (mean_x.square() + mean_y.square() + K1**2) * (variance_x + variance_y + K2**2)
        return (similar / scale).mean()
