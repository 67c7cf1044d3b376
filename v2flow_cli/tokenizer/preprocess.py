"""Image -> pixels and back: the one resize and crop that train, encode and bench share."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature


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


def to_uint8(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] as 8-bit (B, H, W, 3): clamped and rounded to nearest."""
    return images.detach().float().add(1.0).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu()


def psnr(reference: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (B,) float64; infinite where nothing differs.

    Args:  reference, images: (B, H, W, 3) uint8.
    """
    mse = (reference.double() - images.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255.0**2 / mse)


class V2FlowImageProcessor(BaseImageProcessor):
    """Shorter side to ``size`` (bicubic), centre crop to a square, pixels to [-1, 1]."""

    model_input_names: ClassVar = ["pixel_values"]

    def __init__(self, size: int = 256, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size = int(size)

    def preprocess_one(self, image: Image.Image, size: int | None = None) -> Tensor:
        """(3, size, size) in [-1, 1] from an image of any size; ``size`` defaults to the processor's."""
        return crop_to_tensor(image.convert("RGB"), center_crop_box(*image.size), size or self.size)

    def preprocess(self, images: Any, size: int | None = None, **kwargs: Any) -> BatchFeature:
        """``pixel_values`` (B, 3, size, size) in [-1, 1] from one PIL image or a list of them."""
        images = [images] if isinstance(images, Image.Image) else list(images)
        pixels = torch.stack([self.preprocess_one(image, size) for image in images])
        return BatchFeature({"pixel_values": pixels})

    def to_pil(self, images: Tensor) -> list[Image.Image]:
        """8-bit RGB images from (B, 3, H, W) in [-1, 1]."""
        return [Image.fromarray(array) for array in to_uint8(images).numpy()]
