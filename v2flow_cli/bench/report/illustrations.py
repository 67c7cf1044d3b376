"""Error maps, token colours, and images as data URIs."""

from __future__ import annotations

import base64
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from v2flow_cli.store.images import image_bytes

ERROR_FULL_SCALE = 64  # grey levels of mean absolute error that get the brightest colour
_ERROR_RAMP = np.array([[8, 8, 16], [74, 22, 92], [186, 54, 85], [246, 140, 50], [252, 248, 190]], dtype=np.float64)


def error_map(reference: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: mean absolute difference over the channels, dark (none) to bright (64 grey levels)."""
    error = np.abs(reference.astype(np.float64) - picture).mean(axis=-1) / ERROR_FULL_SCALE
    stops = np.linspace(0, 1, len(_ERROR_RAMP))
    channels = [np.interp(error, stops, _ERROR_RAMP[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def token_colours(codebook: Tensor) -> np.ndarray:
    """(K, 3) uint8: near codes get similar colours.

    The first three principal components of the codebook (K, D), each replaced by its rank so that all colours
    occur, are the lightness and the two colour axes of OKLab.
    """
    codes = codebook.detach().float().cpu()
    q = min(3, *codes.shape)
    with torch.random.fork_rng(devices=[]):  # pca_lowrank draws random numbers
        torch.manual_seed(0)
        _, _, axes = torch.pca_lowrank(codes, q=q, niter=4)
    ranks = (codes @ axes).argsort(0).argsort(0).double() / max(1, len(codes) - 1)  # (K, q) in [0, 1]
    ranks = torch.nn.functional.pad(ranks, (0, 3 - q), value=0.5)
    lightness, a, b = 0.42 + 0.46 * ranks[:, 0], 0.24 * (ranks[:, 1] - 0.5), 0.24 * (ranks[:, 2] - 0.5)
    return _oklab_to_srgb(torch.stack([lightness, a, b], dim=1)).numpy()


def _oklab_to_srgb(lab: Tensor) -> Tensor:
    """8-bit sRGB of OKLab colours (N, 3) (Ottosson 2020)."""
    to_lms = torch.tensor(
        [
            [1, 0.3963377774, 0.2158037573],
            [1, -0.1055613458, -0.0638541728],
            [1, -0.0894841775, -1.2914855480],
        ]
    ).double()
    to_rgb = torch.tensor(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    ).double()
    linear = ((lab @ to_lms.T) ** 3 @ to_rgb.T).clamp(0, 1)
    srgb = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (255 * srgb).round().clamp(0, 255).byte()


def token_grid_shape(num_tokens: int) -> tuple[int, int]:
    """(rows, columns) of the squarest grid of ``num_tokens`` cells: 256 is 16 x 16, 128 is 8 x 16."""
    rows = next(r for r in range(math.isqrt(num_tokens), 0, -1) if num_tokens % r == 0)
    return rows, num_tokens // rows


def data_uri(pixels: np.ndarray) -> str:
    """(H, W, 3) uint8 as a data URI, lossless."""
    content = image_bytes(Image.fromarray(np.ascontiguousarray(pixels)), "WEBP", lossless=True, method=4)
    return "data:image/webp;base64," + base64.b64encode(content).decode("ascii")
