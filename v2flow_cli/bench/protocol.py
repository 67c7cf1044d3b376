"""The protocol of a measurement; only figures with the same key may share a table."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

NAME = "v2flow-bench-2"
LIBRARIES = ("torch", "torchmetrics", "lpips", "torch-fidelity", "pillow", "numpy")
NETWORKS = ("lpips", "rfid", "features")  # compared if both results have them
NOT_IN_KEY = (*NETWORKS, "seed", "versions")


@dataclass(frozen=True)
class Protocol:
    """How reconstructions are measured; ``key`` covers all fields except NOT_IN_KEY."""

    image_size: int  # pixels, side of the square reference
    count: int  # images
    reference_digest: str  # 16 hex digits of SHA-256 over the 8-bit references, in order
    lpips: str | None  # backbone and weights; None: not measured
    rfid: str | None
    seed: int  # an image's own seed is derived from it and its name
    versions: dict[str, str]
    features: str | None = None
    name: str = NAME
    crop: str = "shorter side to image_size (Pillow bicubic, antialiased), centre square"
    rounding: str = "reference and reconstruction rounded to 8 bits, RGB, clamped to 0..255"
    psnr: str = "10 log10(255^2 / MSE) over all pixels and channels, per image, in float64; then the mean"
    ssim: str = (
        "torchmetrics, per image and RGB channel, 11 x 11 Gaussian window of sigma 1.5, "
        "K1 0.01, K2 0.03, data range 255, windows wholly inside the image; then the mean"
    )
    ms_ssim: str = (
        "five scales of torchmetrics' terms as in ssim, weights 0.0448, 0.2856, 0.3001, 0.2363, 0.1333, "
        "2 x 2 means between scales, per image; then the mean"
    )
    interval: str = "mean plus or minus Student's t at 95% over images"

    @property
    def key(self) -> str:
        """12 hex digits; figures with different keys are not comparable."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name not in NOT_IN_KEY}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]

    def record(self) -> dict:
        """The protocol as plain JSON values, with its key."""
        return {"key": self.key, **dataclasses.asdict(self)}


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that the figures depend on."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):  # of the extra `metrics`
            versions[name] = version(name)
    return versions
