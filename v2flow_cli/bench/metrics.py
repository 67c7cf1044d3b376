"""The registry of the bench: a metric is one entry of ``METRICS``.

Rows, JSON, CSV, the terminal's and the report's tables and the plots all follow from it. To add a metric, write its
function (``similarity.py`` and ``perceptual.py`` have examples) and add an entry.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from v2flow_cli.bench import similarity
from v2flow_cli.bench.candidates import Batch
from v2flow_cli.bench.codebook_use import CodebookFigures, bits_per_pixel
from v2flow_cli.bench.codec_speed import Speed
from v2flow_cli.bench.networks import MetricNetworks
from v2flow_cli.bench.perceptual import INCEPTION_WIDTH, FrechetDistance


@dataclass(frozen=True)
class SystemFacts:
    """Facts of a system besides its pictures; None if it has no such thing."""

    pixels: float  # of an image, on average
    tokens: float | None  # of an image, on average
    bytes: float | None  # of an image, the mean
    codebook: CodebookFigures | None
    speed: Speed | None


class SetMetric(Protocol):
    """A figure of a set of images, updated batch by batch."""

    def add(self, batch: Batch, pictures: Tensor) -> None:
        """Add a system's ``pictures`` (B, H, W, 3) uint8 of ``batch``."""
        ...

    def value(self, images: int) -> float | None:
        """The figure over all ``images`` of all processes; None if they are too few."""
        ...


@dataclass(frozen=True)
class Metric:
    """One figure of a system, and its format. Exactly one of the three functions is set."""

    key: str  # in JSON and CSV, with the unit
    heading: str  # in tables; "" for only JSON and CSV
    decimals: int
    #: (reference, pictures) (B, H, W, 3) uint8 to one value an image (B,), printed as mean and 95% interval; None if
    #: there is no such figure.
    of_images: Callable[[Tensor, Tensor, MetricNetworks], Tensor | None] | None = None
    of_set: Callable[[MetricNetworks], SetMetric | None] | None = None
    of_system: Callable[[SystemFacts], float | None] | None = None
    better: Literal["higher", "lower", ""] = ""  # only figures with a direction are plotted
    always: bool = False  # has a column even if it was not measured; a note explains why
    infinite: bool = False  # for equal pictures; null in JSON

    def show(self, value: float | None, ci95: float | None = None) -> str:
        """``value`` with its decimals and interval; "-" if not measured, the sign of infinity if infinite."""
        if value is None or math.isinf(value):
            return "∞" if self.infinite or value else "-"
        text = f"{value:,.{self.decimals}f}"
        return text if ci95 is None else f"{text} ± {ci95:.{self.decimals}f}"


class FrechetMetric:
    """Frechet distance of reconstructions to their references in the space of a network.

    Args:  name, of the network, for a batch's reference features, which are computed once; vectors, pictures
           (B, H, W, 3) uint8 to features (B, width).
    """

    def __init__(self, name: str, vectors: Callable[[Tensor], Tensor], width: int) -> None:
        self._name, self._vectors, self._distance = name, vectors, FrechetDistance(width)

    def add(self, batch: Batch, pictures: Tensor) -> None:
        if self._name not in batch.features:
            batch.features[self._name] = self._vectors(batch.reference)
        self._distance.add(batch.features[self._name], self._vectors(pictures))

    def value(self, images: int) -> float | None:
        return self._distance.value(images)


def _of_pixels(function: Callable[[Tensor, Tensor], Tensor | None]) -> Callable[..., Tensor | None]:
    """A function of (reference, pictures) as ``Metric.of_images``: it needs no network."""
    return lambda reference, pictures, networks: function(reference, pictures)


def _of_network(name: str) -> Callable[..., Tensor | None]:
    """The figures of a network, by its name in ``MetricNetworks``, as ``Metric.of_images``; None without it."""

    def figures(reference: Tensor, pictures: Tensor, networks: MetricNetworks) -> Tensor | None:
        network = getattr(networks, name)
        return None if network is None else network(reference, pictures)

    return figures


def _code_bits(name: str) -> Callable[[SystemFacts], float | None]:
    """Bits a pixel by ``entropy_bits`` or ``adaptive_bits`` a token."""
    return lambda s: getattr(s.codebook, name) * (s.tokens or 0) / s.pixels if s.codebook else None


METRICS = (
    Metric("tokens_per_image", "tokens", 0, of_system=lambda s: s.tokens),
    Metric("bytes_per_image", "bytes", 0, of_system=lambda s: s.bytes),
    Metric("bits_per_pixel", "bits/px", 4, of_system=lambda s: s.bytes and bits_per_pixel(s.bytes, s.pixels)),
    Metric("entropy_bits_per_pixel", "entropy bits/px", 4, of_system=_code_bits("entropy_bits")),
    Metric("adaptive_bits_per_pixel", "", 4, of_system=_code_bits("adaptive_bits")),
    Metric("psnr_db", "PSNR dB", 2, _of_pixels(similarity.psnr), better="higher", always=True, infinite=True),
    Metric("ssim", "SSIM", 3, _of_pixels(similarity.ssim), better="higher", always=True),
    Metric("ms_ssim", "MS-SSIM", 3, _of_pixels(similarity.ms_ssim), better="higher"),
    Metric("lpips", "LPIPS", 3, _of_network("lpips"), better="lower", always=True),
    Metric(
        "rfid",
        "rFID",
        2,
        of_set=lambda n: FrechetMetric("inception", n.inception, INCEPTION_WIDTH) if n.inception else None,
        better="lower",
        always=True,
    ),
    Metric("feature_distance", "feature distance", 3, _of_network("features"), better="lower"),
    Metric(
        "feature_frechet",
        "feature Fréchet",
        1,
        of_set=lambda n: FrechetMetric("features", n.features.vectors, n.features.width) if n.features else None,
        better="lower",
    ),
    Metric("encode_images_per_s", "encode/s", 2, of_system=lambda s: s.speed.encode_images_per_s if s.speed else None),
    Metric("decode_images_per_s", "decode/s", 2, of_system=lambda s: s.speed.decode_images_per_s if s.speed else None),
)


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
    from mpmath import betainc, findroot  # a dependency of torch; SciPy needs 140 MB

    def outside(t: float) -> float:
        """Probability of more than t on either side, minus 5%."""
        return betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True) - 0.05

    return float(findroot(outside, (1.95, 12.8), solver="anderson", tol=1e-20))
