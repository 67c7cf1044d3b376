"""The objects of a drawing: what differs from its ground, each cut out and laid on white at one size.

Pictures here are arrays (H, W, 3) uint8.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

GROUND_LEVELS = 36  # of 255, that a pixel may differ from the ground and still be it
MIN_BORDER = 12  # pixels of the border that a ground is fitted to
SHARES = (0.005, 0.95)  # of the pixels, that a foreground may have
SMALL_SHARE = 0.2  # of the largest object: smaller ones are parts that stand apart, or crumbs
MIDDLE = (0.3, 0.7)  # of the foreground's extent, where two objects that touch are split
CANVAS, CANVAS_SHARE = 128, 0.9  # pixels a side of a cut-out, and the share its longest side takes


@dataclass(frozen=True)
class Found:
    """An object: its box (top, left, bottom, right) in pixels, the pixels in it that are its own, and their number."""

    box: tuple[int, int, int, int]
    mask: np.ndarray
    area: int

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of the middle of the box."""
        top, left, bottom, right = self.box
        return (left + right) / 2, (top + bottom) / 2


def foreground(picture: np.ndarray) -> np.ndarray:
    """True (H, W) where the picture is not its ground: a colour, or a linear ramp, that fits its border.

    All of it is foreground where no such ground shows: outside ``SHARES``.
    """
    height, width = picture.shape[:2]
    y, x = np.mgrid[0:height, 0:width]
    places = np.stack([np.ones((height, width)), x / width, y / height], -1)
    pixels = picture.astype(np.float64)
    edge = max(2, round(0.02 * min(height, width)))
    border = np.ones((height, width), bool)
    border[edge:-edge, edge:-edge] = False
    at, colours = places[border], pixels[border]
    fit = np.zeros((3, 3))
    fit[0] = np.median(colours, axis=0)
    for _ in range(3):  # what reaches the border, an object's end, is left out of the next fit
        near = np.abs(colours - at @ fit).max(1) <= GROUND_LEVELS
        if near.sum() < MIN_BORDER:
            break
        fit = np.linalg.lstsq(at[near], colours[near], rcond=None)[0]
    differs = np.abs(pixels - places @ fit).max(-1) > GROUND_LEVELS
    mask = ndimage.binary_fill_holes(ndimage.binary_opening(differs))
    share = mask.mean()
    return mask if SHARES[0] <= share <= SHARES[1] else np.ones((height, width), bool)


def find_objects(picture: np.ndarray) -> list[Found]:
    """The objects of ``picture``, parts that a pixel or two lie between being one, the largest first; at least one."""
    mask = foreground(picture)
    labels, _ = ndimage.label(ndimage.binary_dilation(mask), np.ones((3, 3)))
    areas = np.bincount((labels * mask).ravel())[1:]
    large = [number for number in np.argsort(-areas, kind="stable") if areas[number] >= SMALL_SHARE * areas.max()]
    return [_found((labels == number + 1) & mask) for number in large]


def cut_out(picture: np.ndarray, found: Found) -> np.ndarray:
    """The object on white, its longest side at one size: (CANVAS, CANVAS, 3) uint8."""
    top, left, bottom, right = found.box
    pixels = np.where(found.mask[..., None], picture[top:bottom, left:right], 255).astype(np.uint8)
    scale = CANVAS_SHARE * CANVAS / max(pixels.shape[:2])
    size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (CANVAS, CANVAS), "white")
    canvas.paste(image, ((CANVAS - size[0]) // 2, (CANVAS - size[1]) // 2))
    return np.asarray(canvas)


def whole(picture: np.ndarray) -> Found:
    """All objects of ``picture`` as one: its foreground."""
    return _found(foreground(picture))


def halves(picture: np.ndarray, across: bool) -> list[Found]:
    """Two objects that touch: the foreground's left and right part, or its upper and lower, split where it is thinnest.

    One, the whole foreground, where that leaves nothing on one side.
    """
    mask = foreground(picture)
    thickness = mask.sum(0 if across else 1)
    (extent,) = np.nonzero(thickness)
    start, end = (extent[0] + round(share * (extent[-1] - extent[0])) for share in MIDDLE)
    if end <= start:
        return [_found(mask)]
    cut = start + int(np.argmin(thickness[start:end]))
    first = mask.copy()
    first[:, cut:] &= not across
    first[cut:] &= across
    parts = [part for part in (first, mask & ~first) if part.any()]
    return [_found(part) for part in parts]


def _found(mask: np.ndarray) -> Found:
    [(rows, columns)] = ndimage.find_objects(mask.astype(np.int32))
    return Found((rows.start, columns.start, rows.stop, columns.stop), mask[rows, columns], int(mask.sum()))
