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
from v2flow_cli.bench.perceptual import Features, FrechetDistance, Inception


@dataclass(frozen=True)
class SystemFacts:
    """What is known of a system besides its pictures; None where it has no such thing."""

    pixels: float  # of an image, on average
    tokens: float | None  # of an image, on average
    bytes: float | None  # of an image, the mean
    codebook: CodebookFigures | None
    speed: Speed | None


class SetMetric(Protocol):
    """A figure of a whole set of images, filled batch by batch."""

    def add(self, batch: Batch, pictures: Tensor) -> None:
        """Take in the ``pictures`` (B, S, S, 3) uint8 that a system made of ``batch``."""
        ...

    def value(self, images: int) -> float | None:
        """The figure over all ``images`` of all processes; None where they are too few."""
        ...


@dataclass(frozen=True)
class Metric:
    """One figure of a system: how it is taken and how it is shown. Exactly one of the three functions is set."""

    key: str  # in JSON and CSV, with the unit
    heading: str  # in tables; "" for what only JSON and CSV have
    decimals: int
    #: (reference, pictures) (B, S, S, 3) uint8 to one value an image (B,), shown as mean and 95% interval; None where
    #: there is no such figure.
    of_images: Callable[[Tensor, Tensor, MetricNetworks], Tensor | None] | None = None
    of_set: Callable[[MetricNetworks], SetMetric | None] | None = None
    of_system: Callable[[SystemFacts], float | None] | None = None
    better: Literal["higher", "lower", ""] = ""  # what is plotted has one
    always: bool = False  # has a column even where it was not measured; a note says why
    infinite: bool = False  # of equal pictures; JSON holds null

    def show(self, value: float | None, ci95: float | None = None) -> str:
        """``value`` with its decimals and interval; "-" where not measured, the sign of infinity where infinite."""
        if value is None or math.isinf(value):
            return "∞" if self.infinite or value else "-"
        text = f"{value:,.{self.decimals}f}"
        return text if ci95 is None else f"{text} ± {ci95:.{self.decimals}f}"


class RFID:
    """Frechet distance of reconstructions to their references; a batch's reference features are taken once."""

    def __init__(self, inception: Inception) -> None:
        self._inception, self._distance = inception, FrechetDistance()

    def add(self, batch: Batch, pictures: Tensor) -> None:
        if "inception" not in batch.features:
            batch.features["inception"] = self._inception(batch.reference)
        self._distance.add(batch.features["inception"], self._inception(pictures))

    def value(self, images: int) -> float | None:
        return self._distance.value(images)


class FeatureFrechet:
    """Frechet distance of reconstructions to their references in the features of ``--features``; it is no FID."""

    def __init__(self, features: Features) -> None:
        self._features, self._distance = features, FrechetDistance(features.width)

    def add(self, batch: Batch, pictures: Tensor) -> None:
        if "features" not in batch.features:
            batch.features["features"] = self._features.vectors(batch.reference)
        self._distance.add(batch.features["features"], self._features.vectors(pictures))

    def value(self, images: int) -> float | None:
        return self._distance.value(images)


METRICS = (
    Metric("tokens_per_image", "tokens", 0, of_system=lambda s: s.tokens),
    Metric("bytes_per_image", "bytes", 0, of_system=lambda s: s.bytes),
    Metric("bits_per_pixel", "bits/px", 4, of_system=lambda s: s.bytes and bits_per_pixel(s.bytes, s.pixels)),
    Metric(
        "entropy_bits_per_pixel",
        "entropy bits/px",
        4,
        of_system=lambda s: s.codebook.entropy_bits * (s.tokens or 0) / s.pixels if s.codebook else None,
    ),
    Metric(
        "adaptive_bits_per_pixel",
        "",
        4,
        of_system=lambda s: s.codebook.adaptive_bits * (s.tokens or 0) / s.pixels if s.codebook else None,
    ),
    Metric(
        "psnr_db",
        "PSNR dB",
        2,
        of_images=lambda reference, pictures, _: similarity.psnr(reference, pictures),
        better="higher",
        always=True,
        infinite=True,
    ),
    Metric(
        "ssim",
        "SSIM",
        3,
        of_images=lambda reference, pictures, _: similarity.ssim(reference, pictures),
        better="higher",
        always=True,
    ),
    Metric(
        "ms_ssim",
        "MS-SSIM",
        3,
        of_images=lambda reference, pictures, _: similarity.ms_ssim(reference, pictures),
        better="higher",
    ),
    Metric(
        "lpips",
        "LPIPS",
        3,
        of_images=lambda reference, pictures, n: n.lpips(reference, pictures) if n.lpips else None,
        better="lower",
        always=True,
    ),
    Metric(
        "rfid",
        "rFID",
        2,
        of_set=lambda n: RFID(n.inception) if n.inception else None,
        better="lower",
        always=True,
    ),
    Metric(
        "feature_distance",
        "feature distance",
        3,
        of_images=lambda reference, pictures, n: n.features(reference, pictures) if n.features else None,
        better="lower",
    ),
    Metric(
        "feature_frechet",
        "feature Fréchet",
        1,
        of_set=lambda n: FeatureFrechet(n.features) if n.features else None,
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
    from mpmath import betainc, findroot  # torch brings it; SciPy would take 140 MB for this one number

    def outside(t: float) -> float:
        """Probability of more than t on either side, less the 5% that are wanted."""
        return betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True) - 0.05

    return float(findroot(outside, (1.95, 12.8), solver="anderson", tol=1e-20))
