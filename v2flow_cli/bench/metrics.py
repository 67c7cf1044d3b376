"""What a reconstruction keeps (PSNR, SSIM, MS-SSIM) and how much of the codebook is used.

Figures are per image, never per batch. Images here are 8-bit tensors (B, H, W, 3), as a viewer sees them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torchmetrics.functional.image import structural_similarity_index_measure

from v2flow_cli.tokenizer.preprocess import psnr as psnr

SSIM_SIGMA, SSIM_WINDOW = 1.5, 11  # pixels
_SSIM: dict[str, Any] = {"sigma": SSIM_SIGMA, "data_range": 1.0, "reduction": "none"}
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, fine to coarse
MS_SSIM_MIN_SIZE = SSIM_WINDOW * 2 ** (len(MS_SSIM_WEIGHTS) - 1)  # pixels a side


def ssim(reference: Tensor, images: Tensor) -> Tensor:
    """Structural similarity of each image, (B,) float64 in [-1, 1]; 11 x 11 Gaussian window of sigma 1.5.

    Only windows that lie wholly inside the image count, as in Wang et al. 2004 and scikit-image; torchmetrics
    alone averages over mirrored borders too, in some of its versions.
    Args:  reference, images: (B, H, W, 3) uint8, more than 10 pixels a side.
    """
    a, b = (x.permute(0, 3, 1, 2).float() / 255 for x in (images, reference))
    return _similarity(a, b)


def ms_ssim(reference: Tensor, images: Tensor) -> Tensor | None:
    """Multi-scale SSIM of each image (Wang et al. 2003), (B,) float64 in [0, 1]; None under 176 pixels a side.

    Five scales, each half the one before (2 x 2 means). Like ``ssim``, windows that lie wholly inside count;
    torchmetrics' own function averages its last scale over mirrored borders too.
    Args:  reference, images: (B, H, W, 3) uint8.
    """
    if min(reference.shape[1:3]) < MS_SSIM_MIN_SIZE:
        return None
    # float32, whose error is under 1e-5 here: convolutions in float64 take 25 times as long on a CPU.
    a, b = (x.permute(0, 3, 1, 2).float() / 255 for x in (images, reference))
    product = torch.ones(len(a), dtype=torch.float64)
    for weight in MS_SSIM_WEIGHTS[:-1]:
        _, contrast = structural_similarity_index_measure(a, b, return_contrast_sensitivity=True, **_SSIM)
        product *= contrast.clamp(min=0) ** weight
        a, b = avg_pool2d(a, 2), avg_pool2d(b, 2)
    return product * _similarity(a, b).clamp(min=0) ** MS_SSIM_WEIGHTS[-1]


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    """Mean SSIM of each image (B, 3, H, W) in [0, 1] over the windows wholly inside, (B,) float64."""
    _, similarity = structural_similarity_index_measure(a, b, return_full_image=True, **_SSIM)
    edge = SSIM_WINDOW // 2
    return similarity[..., edge:-edge, edge:-edge].double().flatten(1).mean(1)


@dataclass(frozen=True)
class Estimate:
    """Mean over images, and the half-width of its 95% confidence interval (NaN for fewer than two images)."""

    mean: float
    ci95: float
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95% interval (Student's t) of per-image figures.  Raises: ValueError for none."""
    n = len(values)
    if not n:
        raise ValueError("no values")
    mean = math.fsum(values) / n
    if n < 2 or not math.isfinite(mean):
        return Estimate(mean, math.nan, n)
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return Estimate(mean, student_t_97_5(n - 1) * math.sqrt(variance / n), n)


@functools.cache
def student_t_97_5(degrees: int) -> float:
    """The 97.5% quantile of Student's t with ``degrees`` of freedom, at least 1: half the width of a 95% interval."""
    from mpmath import betainc, findroot  # torch brings it; SciPy would take 140 MB for this one number

    def outside(t: float) -> float:
        """Probability of more than t on either side, less the 5% that are wanted."""
        return betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True) - 0.05

    return float(findroot(outside, (1.95, 12.8), solver="anderson", tol=1e-20))


@dataclass(frozen=True)
class CodebookFigures:
    """How much of the codebook the token ids of all images use."""

    codebook_size: int  # K
    tokens: int  # ids counted; at most this many codes can be used
    distinct: int
    usage: float  # distinct / K, in [0, 1]
    perplexity: float  # exp of the entropy, in [1, K]
    entropy_bits: float  # bits a token under the ideal order-0 code of these very ids; log2 K when all are as likely
    adaptive_bits: float  # bits a token under an adaptive code that knows nothing beforehand and learns as it goes


class CodebookCounter:
    """Counts token ids over batches."""

    def __init__(self, codebook_size: int) -> None:
        self._counts = torch.zeros(codebook_size, dtype=torch.int64)

    def add(self, token_ids: Tensor) -> None:
        """Count ``token_ids``, integers in [0, K) of any shape."""
        self._counts += torch.bincount(token_ids.flatten().cpu(), minlength=len(self._counts))

    def share(self, total: Callable[[Sequence[int]], list[int]]) -> None:
        """Count what every rank has counted; ``total`` adds up numbers over them."""
        self._counts = torch.tensor(total(self._counts.tolist()))

    def figures(self) -> CodebookFigures:
        """Usage, perplexity and bits of all ids so far (at least one).

        Of few ids the entropy is too low, since it grants the code table for free; the adaptive code
        (Krichevsky-Trofimov: each code starts at count 1/2) pays for it, so the truth lies between the two.
        """
        total, size = int(self._counts.sum()), len(self._counts)
        p = self._counts[self._counts > 0].double() / total
        entropy = abs(float(-(p * p.log()).sum()))  # nats; abs: a single code gives -0.0
        half = torch.tensor(0.5).double()
        code = torch.lgamma(total + size * half) - torch.lgamma(size * half)  # nats, whatever the order of the ids
        code = code - (torch.lgamma(self._counts + half) - torch.lgamma(half)).sum()
        bits = entropy / math.log(2), float(code) / total / math.log(2)
        return CodebookFigures(size, total, len(p), len(p) / size, math.exp(entropy), *bits)


def bits_per_pixel(bytes_per_image: float, height: int, width: int) -> float:
    """Bits per pixel of an image of ``height`` x ``width`` that takes ``bytes_per_image``."""
    return 8 * bytes_per_image / (height * width)


def token_bytes(tokens_per_image: int, codebook_size: int) -> int:
    """Bytes that hold ``tokens_per_image`` ids of ceil(log2 K) bits: 256 ids of 16,384 codes take 448."""
    return math.ceil(tokens_per_image * max(1, math.ceil(math.log2(codebook_size))) / 8)
