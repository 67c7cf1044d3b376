"""Images of every mode that Pillow decodes to upright 8-bit RGB, for commands and the image processor."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB, upright (EXIF), with alpha composited over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_8_bit(np.asarray(image, dtype=np.float64), image.mode)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")  # Pillow inverts the CMYK of Adobe's files


def _to_8_bit(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values of more than 8 bits as uint8; Pillow's own conversion would clip them at 255.

    White is 65,535 for integers. For floats it is the smallest of 1, 255 and 65,535 that no value exceeds, else the
    maximum.
    """
    values = np.nan_to_num(values, posinf=0.0, neginf=0.0)
    maximum = float(values.max())
    white = next((w for w in ((1.0, 255.0, 65535.0) if mode == "F" else (65535.0,)) if maximum <= w), maximum)
    return (values.clip(0, white) * (255.0 / white)).round().astype(np.uint8)
