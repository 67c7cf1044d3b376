"""JPEG, WebP and AVIF within a number of bytes: the best of several downscales and qualities."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, features

from v2flow_cli.store.images import image_bytes

#: The picture is stored at 1/n of its side and enlarged again (Lanczos both ways).
DOWNSCALES = (1, 2, 3, 4, 6, 8, 12, 16)
_RESAMPLE = Image.Resampling.LANCZOS


@dataclass(frozen=True)
class Codec:
    """An image format that Pillow writes."""

    name: str
    feature: str  # its name in Pillow's ``features``
    min_quality: int
    max_quality: int
    options: Mapping[str, Any] = field(default_factory=dict)


CODECS = (
    Codec("JPEG", "jpg", 1, 95, {"optimize": True, "subsampling": "4:2:0"}),
    Codec("WebP", "webp", 0, 100, {"method": 6}),
    # speed 3 takes ten times as long for about 0.1 dB
    Codec("AVIF", "avif", 0, 100, {"speed": 6, "max_threads": 1}),
)


@dataclass(frozen=True)
class CodecResult:
    """A picture after the codec.  pixels: (H, W, 3) uint8 at full size; bytes: of the whole file."""

    pixels: np.ndarray
    bytes: int
    psnr: float  # dB


def available_codecs() -> tuple[list[Codec], list[str]]:
    """The codecs that this Pillow can write, and one line for each that it cannot."""
    available = [codec for codec in CODECS if features.check(codec.feature)]
    lines = [
        f"{codec.name} is left out: this build of Pillow lacks it (wheels of Pillow 11.3 and later have it)."
        for codec in CODECS
        if codec not in available
    ]
    return available, lines


def best_at(codec: Codec, pixels: np.ndarray, budget: int) -> CodecResult:
    """The best by PSNR over all downscales, each at the highest quality that fits into ``budget`` bytes.

    If no setting fits, the smallest file that was tried, with its real size.
    Args:  pixels, (H, W, 3) uint8; budget, bytes.
    """
    image = Image.fromarray(pixels)
    best: CodecResult | None = None
    smallest: bytes | None = None
    for downscale in DOWNSCALES:
        size = (max(1, round(image.width / downscale)), max(1, round(image.height / downscale)))
        small = image.resize(size, _RESAMPLE) if downscale > 1 else image
        content = _largest_within(codec, small, budget)
        if len(content) <= budget:
            candidate = _decode(content, pixels)
            if best is None or candidate.psnr > best.psnr:
                best = candidate
        elif smallest is None or len(content) < len(smallest):
            smallest = content
    if best is None:
        assert smallest is not None  # if none fitted, all were too large
        best = _decode(smallest, pixels)
    return best


def _largest_within(codec: Codec, image: Image.Image, budget: int) -> bytes:
    """The file of the highest quality within ``budget``, by bisection; of the lowest if none is."""
    low, high = codec.min_quality, codec.max_quality + 1  # low fits, high does not
    content = _encode(codec, image, low)
    if len(content) > budget:
        return content
    while high - low > 1:
        middle = (low + high) // 2
        trial = _encode(codec, image, middle)
        if len(trial) <= budget:
            low, content = middle, trial
        else:
            high = middle
    return content


def _encode(codec: Codec, image: Image.Image, quality: int) -> bytes:
    return image_bytes(image, codec.name.upper(), quality=quality, **codec.options)


def _decode(content: bytes, reference: np.ndarray) -> CodecResult:
    height, width, _ = reference.shape
    decoded = Image.open(io.BytesIO(content)).convert("RGB")
    if decoded.size != (width, height):
        decoded = decoded.resize((width, height), _RESAMPLE)
    pixels = np.asarray(decoded)
    mse = np.square(pixels.astype(np.float64) - reference).mean()
    psnr = float(10 * np.log10(255.0**2 / mse)) if mse else float("inf")
    return CodecResult(pixels, len(content), psnr)
