"""The objects of a drawing: regions that differ from its background, cut out on white at one size.

Pictures here are arrays (H, W, 3) uint8.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from v2flow_cli.runtime.extras import extra

with extra("metrics", "scipy", "bench draw"):
    from scipy import ndimage

GROUND_LEVELS = 36  # of 255, the most that a background pixel may differ from the background's fit
MIN_BORDER = 12  # least border pixels for the fit of a background
SHARES = (0.005, 0.95)  # least and most of the pixels that a foreground may have
SMALL_SHARE = 0.2  # of the largest object: smaller ones are detached parts
MIDDLE = (0.3, 0.7)  # of the foreground's extent, between which two touching objects are split
CANVAS, CANVAS_SHARE = 128, 0.9  # pixels a side of a cut-out, and the share of its longest side


@dataclass(frozen=True)
class PictureObject:
    """An object: its box (top, left, bottom, right) in pixels, the mask of its pixels in the box, and their number."""

    box: tuple[int, int, int, int]
    mask: np.ndarray
    area: int

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of the middle of the box."""
        top, left, bottom, right = self.box
        return (left + right) / 2, (top + bottom) / 2


def foreground(picture: np.ndarray) -> np.ndarray:
    """True (H, W) where the picture differs from its background, a colour or linear ramp fitted to its border.

    The whole picture is foreground if the share of the foreground is outside ``SHARES``.
    """
    height, width = picture.shape[:2]
    y, x = np.mgrid[0:height, 0:width]
    positions = np.stack([np.ones((height, width)), x / width, y / height], -1)
    pixels = picture.astype(np.float64)
    edge = max(2, round(0.02 * min(height, width)))
    border = np.ones((height, width), bool)
    border[edge:-edge, edge:-edge] = False
    at, colours = positions[border], pixels[border]
    fit = np.zeros((3, 3))
    fit[0] = np.median(colours, axis=0)
    for _ in range(3):  # border pixels of objects are left out of the next fit
        near = np.abs(colours - at @ fit).max(1) <= GROUND_LEVELS
        if near.sum() < MIN_BORDER:
            break
        fit = np.linalg.lstsq(at[near], colours[near], rcond=None)[0]
    differs = np.abs(pixels - positions @ fit).max(-1) > GROUND_LEVELS
    mask = ndimage.binary_fill_holes(ndimage.binary_opening(differs))
    share = mask.mean()
    return mask if SHARES[0] <= share <= SHARES[1] else np.ones((height, width), bool)


def find_objects(picture: np.ndarray) -> list[PictureObject]:
    """The objects of ``picture``, largest first, at least one; parts at most two pixels apart are one object."""
    mask = foreground(picture)
    labels, _ = ndimage.label(ndimage.binary_dilation(mask), np.ones((3, 3)))
    areas = np.bincount((labels * mask).ravel())[1:]
    large = [number for number in np.argsort(-areas, kind="stable") if areas[number] >= SMALL_SHARE * areas.max()]
    return [_from_mask((labels == number + 1) & mask) for number in large]


def cut_out(picture: np.ndarray, region: PictureObject) -> np.ndarray:
    """The object on white, with a longest side of one size: (CANVAS, CANVAS, 3) uint8."""
    top, left, bottom, right = region.box
    pixels = np.where(region.mask[..., None], picture[top:bottom, left:right], 255).astype(np.uint8)
    scale = CANVAS_SHARE * CANVAS / max(pixels.shape[:2])
    size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (CANVAS, CANVAS), "white")
    canvas.paste(image, ((CANVAS - size[0]) // 2, (CANVAS - size[1]) // 2))
    return np.asarray(canvas)


def whole(picture: np.ndarray) -> PictureObject:
    """All objects of ``picture`` as one: its foreground."""
    return _from_mask(foreground(picture))


def halves(picture: np.ndarray, across: bool) -> list[PictureObject]:
    """Two touching objects: the foreground's left and right, or upper and lower part, split where it is thinnest.

    The whole foreground if one side would be empty.
    """
    mask = foreground(picture)
    thickness = mask.sum(0 if across else 1)
    (extent,) = np.nonzero(thickness)
    start, end = (extent[0] + round(share * (extent[-1] - extent[0])) for share in MIDDLE)
    if end <= start:
        return [_from_mask(mask)]
    cut = start + int(np.argmin(thickness[start:end]))
    first = mask.copy()
    first[:, cut:] &= not across
    first[cut:] &= across
    parts = [part for part in (first, mask & ~first) if part.any()]
    return [_from_mask(part) for part in parts]


def _from_mask(mask: np.ndarray) -> PictureObject:
    [(rows, columns)] = ndimage.find_objects(mask.astype(np.int32))
    return PictureObject((rows.start, columns.start, rows.stop, columns.stop), mask[rows, columns], int(mask.sum()))
