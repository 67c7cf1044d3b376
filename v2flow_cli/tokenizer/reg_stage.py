"""RegNet-Y blocks on the latents' grid (Radosavovic et al., arXiv 2003.13678); the V2Flow paper's RegStage.

The names of the weights are timm's, from which the blocks are taken. timm itself is not a dependency: importing it adds
two seconds to the start of a command (torchvision, torch._dynamo).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

SQUEEZE = 0.25  # channels of the squeeze-and-excitation, as a share of the block's


class RegStage(nn.Sequential):
    """``depth`` blocks of one width on (B, C, h, w); the identity where ``depth`` is 0."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        for i in range(depth):
            self.add_module(f"b{i + 1}", RegBlock(width))


class RegBlock(nn.Module):
    """SiLU(x + 1x1(squeeze-and-excitation(depthwise 3x3(1x1(x))))), a layer norm after every convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(width, 1)
        self.conv2 = ConvNorm(width, 3, groups=width)
        self.se = SqueezeExcite(width, round(width * SQUEEZE))
        self.conv3 = ConvNorm(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.silu(self.conv2(F.silu(self.conv1(x), inplace=True)), inplace=True)
        return F.silu(self.conv3(self.se(inner)) + x)


class ConvNorm(nn.Module):
    """A convolution that keeps (B, C, h, w), and a layer norm over the channels of each position."""

    def __init__(self, width: int, kernel: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    """Channels (B, C, h, w) weighted by a function of their means over the image (Hu et al., arXiv 1709.01507)."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return x * self.fc2(F.silu(self.fc1(mean), inplace=True)).sigmoid()
