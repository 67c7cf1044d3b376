"""Image -> pixels and back: the one resize and crop that train, encode and bench share."""

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

ImageLike: TypeAlias = Image.Image | np.ndarray | Tensor
Channels: TypeAlias = Literal["channels_first", "channels_last"]


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


def as_images(images: ImageLike | Iterable[ImageLike], channels: Channels | None = None) -> list[Image.Image]:
    """Pictures as ``to_rgb`` makes them: of one PIL image, array or tensor, of a batch, or of a list of these.

    Args:    arrays and tensors (H, W), (H, W, C), (C, H, W), or a batch (B, ...) of them, with C 1, 3 or 4 (RGBA):
             uint8 in [0, 255] or floats in [0, 1]; channels, where both ends of a shape could be C (default: last
             in an array, first in a tensor).
    Raises:  DataError for whatever is not that.
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
    return [picture for image in images for picture in as_images(image, channels)]


def _from_pixels(pixels: np.ndarray | Tensor, channels: Channels | None) -> Image.Image:
    shape = tuple(pixels.shape)
    array = pixels.detach().cpu().float().numpy() if _is_float_tensor(pixels) else np.asarray(pixels)
    if array.ndim == 3:
        first, last = shape[0] in (1, 3, 4), shape[2] in (1, 3, 4)
        if first and last:
            wanted = channels or ("channels_first" if isinstance(pixels, Tensor) else "channels_last")
            first = wanted == "channels_first"
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


def _is_float_tensor(pixels: np.ndarray | Tensor) -> bool:
    return isinstance(pixels, Tensor) and pixels.is_floating_point()  # bf16, which NumPy does not know, among them


class V2FlowImageProcessor(BaseImageProcessor):
    """Shorter side to ``size`` (bicubic), centre crop to a square, pixels to [-1, 1]."""

    model_input_names: ClassVar = ["pixel_values"]

    def __init__(self, size: int = 256, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size = int(size)

    def preprocess_one(self, image: Image.Image, size: int | None = None) -> Tensor:
        """(3, size, size) in [-1, 1] from an image of any size; ``size`` defaults to the processor's."""
        return crop_to_tensor(to_rgb(image), center_crop_box(*image.size), size or self.size)

    def __call__(self, images: ImageLike | Iterable[ImageLike], **kwargs: Any) -> BatchFeature:
        """As ``preprocess``."""
        return self.preprocess(images, **kwargs)

    def preprocess(
        self,
        images: ImageLike | Iterable[ImageLike],
        size: int | None = None,
        return_tensors: Literal["pt", "np"] = "pt",
        input_data_format: Channels | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """``pixel_values`` (B, 3, size, size), float32 in [-1, 1].

        Args:    images, one PIL image, array or tensor, a batch or a list, as ``as_images`` takes them with
                 ``input_data_format``; size, pixels (default: the processor's); return_tensors, "pt" or "np".
        Raises:  DataError for anything else.
        """
        if kwargs:
            raise DataError(f"{', '.join(kwargs)}: not an option of the v2flow image processor.")
        if return_tensors not in ("pt", "np"):
            raise DataError(f"return_tensors is {return_tensors!r}; expected 'pt' or 'np'.")
        pictures = as_images(images, input_data_format)
        if not pictures:
            raise DataError("no image: the list is empty.")
        pixels = torch.stack([self.preprocess_one(picture, size) for picture in pictures])
        return BatchFeature({"pixel_values": pixels if return_tensors == "pt" else pixels.numpy()})

    def to_pil(self, images: Tensor) -> list[Image.Image]:
        """8-bit RGB images from (B, 3, H, W) in [-1, 1]."""
        return [Image.fromarray(array) for array in to_uint8(images).numpy()]
