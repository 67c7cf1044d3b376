"""Image -> pixels and back: the resize and crop of train, encode and bench."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from v2flow_cli.recipe.schema import MAX_ASPECT
from v2flow_cli.runtime.rgb import to_rgb


def fitted_size(width: int, height: int, side: int, multiple: int) -> tuple[int, int]:
    """(height, width) for an image of ``width`` x ``height`` pixels, with almost the same aspect.

    Both are multiples of ``multiple`` pixels, with the area nearest to ``side`` squared and the aspect nearest to the
    image's, which is limited to MAX_ASPECT.
    """
    if height > width:  # so that an image and its transpose resolve ties in the same way
        wide, high = fitted_size(height, width, side, multiple)
        return high, wide
    aspect = min(MAX_ASPECT, width / height)
    cells = side / multiple
    rows, columns = cells / math.sqrt(aspect), cells * math.sqrt(aspect)

    def error(grid: tuple[int, ...]) -> float:
        area, shape = grid[0] * grid[1] / cells**2, grid[1] / grid[0] / aspect
        return abs(math.log(area)) + abs(math.log(shape))

    grids = itertools.product(*({max(1, math.floor(n)), math.ceil(n)} for n in (rows, columns)))
    best = min(sorted(grids), key=error)
    return best[0] * multiple, best[1] * multiple


def center_crop_box(width: int, height: int, aspect: float = 1.0) -> tuple[float, float, float, float]:
    """The largest centred box, ``aspect`` times as wide as high, as (left, top, right, bottom) in whole pixels."""
    wide, high = (
        (width, max(1, round(width / aspect))) if width <= height * aspect else (round(height * aspect), height)
    )
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def crop_to_tensor(image: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int]) -> Tensor:
    """The region ``box`` of an RGB image, resized (bicubic, antialiased) to ``size`` (H, W): (3, H, W) in [-1, 1]."""
    return from_uint8(crop_to_uint8(image, box, size))


def crop_to_uint8(image: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int]) -> Tensor:
    """As ``crop_to_tensor``, but 8-bit pixels (H, W, 3): a quarter of the bytes."""
    height, width = size
    if image.size != (width, height) or tuple(box) != (0, 0, width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.asarray(image, dtype=np.uint8).copy())


def from_uint8(pixels: Tensor) -> Tensor:
    """8-bit pixels (..., H, W, 3) as images (..., 3, H, W) in [-1, 1], on the same device."""
    return pixels.movedim(-1, -3).float().div_(127.5).sub_(1.0)


def image_to_tensor(image: Image.Image, size: int | tuple[int, int]) -> Tensor:
    """The largest centred part of an image of any size and kind that has the aspect of ``size``.

    Args:    size, side of a square or (H, W), in pixels.
    Returns: (3, H, W) in [-1, 1].
    """
    height, width = (size, size) if isinstance(size, int) else size
    image = to_rgb(image)
    return crop_to_tensor(image, center_crop_box(*image.size, width / height), (height, width))


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
