"""The tokenizer's preprocessing as a transformers image processor, around ``preprocess.py``.

It has its own file because importing ``BaseImageProcessor`` imports most of transformers and torchvision: seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from v2flow_cli.errors import DataError
from v2flow_cli.runtime.rgb import to_rgb
from v2flow_cli.tokenizer.preprocess import image_to_tensor, to_pil

ImageLike: TypeAlias = Image.Image | np.ndarray | Tensor
Channels: TypeAlias = Literal["channels_first", "channels_last"]


def as_images(images: ImageLike | Iterable[ImageLike], channels: Channels | None = None) -> list[Image.Image]:
    """RGB images from one PIL image, array or tensor, from a batch, or from a list of these.

    Args:    images, arrays and tensors (H, W), (H, W, C), (C, H, W), or a batch (B, ...) of them, with C 1, 3 or 4
             (RGBA): uint8 in [0, 255] or floats in [0, 1]; channels, for a shape with C possible at both ends
             (default: last in an array, first in a tensor).
    Raises:  DataError for any other input.
    """
    if isinstance(images, Image.Image):
        return [to_rgb(images)]
    if isinstance(images, np.ndarray | Tensor):
        batch = images if images.ndim == 4 else images[None]
        return [_from_pixels(pixels, channels) for pixels in batch]
    if isinstance(images, str | bytes) or not isinstance(images, Iterable):
        raise DataError(
            f"an image of type {type(images).__name__}; expected PIL images, arrays or tensors. Open a file with "
            "PIL.Image.open first."
        )
    return [rgb for image in images for rgb in as_images(image, channels)]


def _from_pixels(pixels: np.ndarray | Tensor, channels: Channels | None) -> Image.Image:
    shape = tuple(pixels.shape)
    if isinstance(pixels, Tensor):  # in float32, because NumPy has no bf16
        pixels = pixels.detach().cpu()
        array = (pixels.float() if pixels.is_floating_point() else pixels).numpy()
    else:
        array = pixels
    if array.ndim == 3:
        first, last = shape[0] in (1, 3, 4), shape[2] in (1, 3, 4)
        if first and last:
            order = channels or ("channels_first" if isinstance(pixels, Tensor) else "channels_last")
            first = order == "channels_first"
        if first and channels != "channels_last":
            array = array.transpose(1, 2, 0)
        elif not last or channels == "channels_first":
            raise DataError(
                f"an image of shape {shape}; expected 1, 3 or 4 channels{f', {channels}' if channels else ''}."
            )
        if array.shape[2] == 1:
            array = array[:, :, 0]
    elif array.ndim != 2:
        raise DataError(f"an image of shape {shape}; expected (H, W), (H, W, C) or (C, H, W), or a batch of them.")
    if array.size == 0:
        raise DataError(f"an image of shape {shape} has no pixels.")
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # also true for NaN
            raise DataError(f"float pixels from {low:.3g} to {high:.3g}; expected [0, 1], or uint8 in [0, 255].")
        array = (array * 255).round()
    elif not np.issubdtype(array.dtype, np.integer) or not 0 <= array.min() <= array.max() <= 255:
        raise DataError(f"pixels of type {array.dtype}; expected uint8 in [0, 255], or floats in [0, 1].")
    return to_rgb(Image.fromarray(np.ascontiguousarray(array, dtype=np.uint8)))


class V2FlowImageProcessor(BaseImageProcessor):
    """The largest centred square, or crop of another aspect, resized (bicubic), with pixels in [-1, 1]."""

    model_input_names: ClassVar = ["pixel_values"]

    def __init__(self, size: int = 256, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size = int(size)

    def preprocess_one(self, image: Image.Image, size: int | tuple[int, int] | None = None) -> Tensor:
        """(3, H, W) in [-1, 1] from an image of any size; ``size`` as ``preprocess`` takes it."""
        return image_to_tensor(image, size or self.size)

    def __call__(self, images: ImageLike | Iterable[ImageLike], **kwargs: Any) -> BatchFeature:
        """As ``preprocess``."""
        return self.preprocess(images, **kwargs)

    def preprocess(
        self,
        images: ImageLike | Iterable[ImageLike],
        size: int | tuple[int, int] | None = None,
        return_tensors: Literal["pt", "np"] = "pt",
        input_data_format: Channels | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """``pixel_values`` (B, 3, H, W), float32 in [-1, 1].

        Args:    images, one PIL image, array or tensor, a batch or a list, as ``as_images`` takes them with
                 ``input_data_format``; size, side of a square or (height, width) in pixels (default: the
                 processor's); return_tensors, "pt" or "np".
        Raises:  DataError for anything else.
        """
        if kwargs:
            raise DataError(f"{', '.join(kwargs)}: not an option of the v2flow image processor.")
        if return_tensors not in ("pt", "np"):
            raise DataError(f"return_tensors is {return_tensors!r}; expected 'pt' or 'np'.")
        rgb_images = as_images(images, input_data_format)
        if not rgb_images:
            raise DataError("no image: the list is empty.")
        pixels = torch.stack([self.preprocess_one(image, size) for image in rgb_images])
        return BatchFeature({"pixel_values": pixels if return_tensors == "pt" else pixels.numpy()})

    def to_pil(self, images: Tensor) -> list[Image.Image]:
        """8-bit RGB images from (B, 3, H, W) in [-1, 1]."""
        return to_pil(images)
