"""Image -> pixels and back: the one resize and crop that train, encode and bench share."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from v2flow_cli.runtime.rgb import to_rgb


def center_crop_box(width: int, height: int) -> tuple[float, float, float, float]:
    """The largest centred square of a ``width`` x ``height`` image as (left, top, right, bottom) in pixels."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def crop_to_tensor(image: Image.Image, box: tuple[float, float, float, float], size: int) -> Tensor:
    """The region ``box`` of an RGB image, resized (bicubic, antialiased) to (3, size, size) in [-1, 1]."""
    if image.size != (size, size) or tuple(box) != (0, 0, size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels = torch.from_numpy(np.asarray(image, dtype=np.uint8).copy())
    return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def image_to_tensor(image: Image.Image, size: int) -> Tensor:
    """The largest centred square of an image of any size and kind, as (3, size, size) in [-1, 1]."""
    return crop_to_tensor(to_rgb(image), center_crop_box(*image.size), size)


def to_uint8(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] as 8-bit (B, H, W, 3): clamped and rounded to nearest."""
    return images.detach().float().add(1.0).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu()


def psnr(reference: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (B,) float64; infinite where nothing differs.

    Args:  reference, images: (B, H, W, 3) uint8.
    """
    mse = (reference.double() - images.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255.0**2 / mse)


def to_pil(images: Tensor) -> list[Image.Image]:
    """8-bit RGB images from (B, 3, H, W) in [-1, 1]."""
    return [Image.fromarray(array) for array in to_uint8(images).numpy()]
