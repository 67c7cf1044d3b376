"""Similarity of a reconstruction to its reference by pixels: PSNR, SSIM and MS-SSIM of each image.

Images here are 8-bit tensors (B, H, W, 3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torchmetrics.functional.image import structural_similarity_index_measure

from v2flow_cli.tokenizer.preprocess import psnr as psnr

SSIM_SIGMA, SSIM_WINDOW = 1.5, 11  # pixels
_SSIM: dict[str, Any] = {"sigma": SSIM_SIGMA, "data_range": 1.0, "reduction": "none"}
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, fine to coarse
MS_SSIM_MIN_SIZE = SSIM_WINDOW * 2 ** (len(MS_SSIM_WEIGHTS) - 1)  # pixels a side


def ssim(reference: Tensor, images: Tensor) -> Tensor:
    """Structural similarity of each image, (B,) float64 in [-1, 1]; 11 x 11 Gaussian window of sigma 1.5.

    Only windows inside the image count, as in Wang et al. 2004 and scikit-image; some versions of torchmetrics also
    average over mirrored borders.
    Args:  reference, images: (B, H, W, 3) uint8, more than 10 pixels a side.
    """
    a, b = (x.permute(0, 3, 1, 2).float() / 255 for x in (images, reference))
    return _similarity(a, b)


def ms_ssim(reference: Tensor, images: Tensor) -> Tensor | None:
    """Multi-scale SSIM of each image (Wang et al. 2003), (B,) float64 in [0, 1]; None under 176 pixels a side.

    Five scales, each half the one before (2 x 2 means). As in ``ssim``, only windows inside the image count;
    torchmetrics' own function also averages its last scale over mirrored borders.
    Args:  reference, images: (B, H, W, 3) uint8.
    """
    if min(reference.shape[1:3]) < MS_SSIM_MIN_SIZE:
        return None
    # float32, whose error is under 1e-5 here: convolutions in float64 take 25 times as long on a CPU.
    a, b = (x.permute(0, 3, 1, 2).float() / 255 for x in (images, reference))
    product = torch.ones(len(a), dtype=torch.float64)
    for weight in MS_SSIM_WEIGHTS[:-1]:
        _, contrast = structural_similarity_index_measure(a, b, return_contrast_sensitivity=True, **_SSIM)
        product *= contrast.clamp(min=0) ** weight
        a, b = avg_pool2d(a, 2), avg_pool2d(b, 2)
    return product * _similarity(a, b).clamp(min=0) ** MS_SSIM_WEIGHTS[-1]


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    """Mean SSIM of each image (B, 3, H, W) in [0, 1] over the windows inside it, (B,) float64."""
    _, similarity = structural_similarity_index_measure(a, b, return_full_image=True, **_SSIM)
    edge = SSIM_WINDOW // 2
    return similarity[..., edge:-edge, edge:-edge].double().flatten(1).mean(1)
