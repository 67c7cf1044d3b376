"""The adversarial loss: a critic on the features of a frozen network (projected GAN, arXiv 2111.01007).

The critic is trained beside the decoder, by the same optimizer and in the same backward pass: its own loss sees the
pictures detached, and the decoder's loss sees the critic's weights detached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from v2flow_cli.training.perceptual import FeatureNetwork, Lpips

SIDE = 64  # of the image whose blocks tell the heads their widths


class AdversarialLosses(NamedTuple):
    """Means over images, positions and blocks; tensors ()."""

    decoder: Tensor  # minus the critic's score of the pictures
    critic: Tensor  # hinge loss: photos above 1, pictures below -1


class Critic(nn.Module):
    """A small convolutional head on each block of a network; it scores photos high and decoded pictures low."""

    def __init__(self, network: FeatureNetwork | Lpips, width: int = 64) -> None:
        super().__init__()
        with torch.device("cpu"), torch.no_grad():
            widths = [block.shape[1] for block in network.cpu().blocks(torch.zeros(1, 3, SIDE, SIDE))]
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, width, 1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(width, width, 3, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(width, 1, 1),
            )
            for channels in widths
        )

    def forward(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Scores (B, 1, h, w) of blocks (B, C, h, w)."""
        return [head(block) for head, block in zip(self.heads, blocks, strict=True)]

    def losses(self, pictures: Sequence[Tensor], photos: Sequence[Tensor]) -> AdversarialLosses:
        """Losses of the blocks of decoded ``pictures``, with gradients, and of ``photos``."""
        # The heads see numbers near 1: the blocks of a network differ in size by a factor of 100.
        scales = [block.detach().square().mean().clamp(min=1e-12).rsqrt() for block in photos]
        pictures = [block * scale for block, scale in zip(pictures, scales)]
        photos = [block.detach() * scale for block, scale in zip(photos, scales)]
        frozen = {name: weight.detach() for name, weight in self.named_parameters()}
        decoder = [-scores.float().mean() for scores in functional_call(self, frozen, (pictures,))]
        critic = [
            F.relu(1 - real.float()).mean() + F.relu(1 + drawn.float()).mean()
            for real, drawn in zip(self(photos), self([block.detach() for block in pictures]))
        ]
        return AdversarialLosses(torch.stack(decoder).mean(), torch.stack(critic).mean())
