"""Pictures of every kind that Pillow decodes, as upright 8-bit RGB: what commands and the image processor agree on."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as 8-bit RGB, upright (EXIF), alpha laid over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_8_bit(np.asarray(image, dtype=np.float64), image.mode)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")  # CMYK, inverted by Pillow where Adobe wrote it so


def _to_8_bit(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values of more than 8 bits as uint8; Pillow's own conversion would clip them at 255.

    White is 65,535 for integers. Floats do not say: the smallest of 1, 255 and 65,535 that holds every value;
    whatever is larger than these is scaled by its maximum.
    """
    values = np.nan_to_num(values, posinf=0.0, neginf=0.0)
    top = float(values.max())
    white = next((w for w in ((1.0, 255.0, 65535.0) if mode == "F" else (65535.0,)) if top <= w), top)
    return (values.clip(0, white) * (255.0 / white)).round().astype(np.uint8)
