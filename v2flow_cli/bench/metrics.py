"""What a reconstruction keeps (PSNR, SSIM, LPIPS) and how much of the codebook is used.

Figures are per image, never per batch. Images here are 8-bit tensors (B, H, W, 3), as a viewer sees them.
"""

from __future__ import annotations

import math
import socket
import urllib.error
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.special import stdtrit
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from v2flow_cli.errors import ModelError

SSIM_SIGMA, SSIM_WINDOW = 1.5, 11  # pixels
LPIPS_NETS = ("alex", "vgg", "squeeze")


def psnr(reference: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (B,) float64; infinite where nothing differs.

    Args:  reference, images: (B, H, W, 3) uint8.
    """
    mse = (reference.double() - images.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255.0**2 / mse)


def ssim(reference: Tensor, images: Tensor) -> Tensor:
    """Structural similarity of each image, (B,) float64 in [-1, 1]; 11 x 11 Gaussian window of sigma 1.5.

    Only windows that lie wholly inside the image count, as in Wang et al. 2004 and scikit-image; torchmetrics
    alone averages over mirrored borders too, in some of its versions.
    Args:  reference, images: (B, H, W, 3) uint8, more than 10 pixels a side.
    """
    a, b = (x.permute(0, 3, 1, 2).float() / 255 for x in (images, reference))
    _, similarity = structural_similarity_index_measure(
        a, b, sigma=SSIM_SIGMA, data_range=1.0, reduction="none", return_full_image=True
    )
    edge = SSIM_WINDOW // 2
    return similarity[..., edge:-edge, edge:-edge].double().flatten(1).mean(1)


class Lpips:
    """LPIPS of each image, (B,) float32 on the CPU: the `lpips` package, version 0.1 weights."""

    def __init__(self, model: torch.nn.Module, net: str, device: torch.device) -> None:
        self.net, self._device = net, device
        self._model = model.to(device).eval().requires_grad_(False)

    def __call__(self, reference: Tensor, images: Tensor) -> Tensor:
        a, b = (x.permute(0, 3, 1, 2).to(self._device).float() / 127.5 - 1 for x in (reference, images))
        with torch.inference_mode():
            return self._model(a, b).reshape(len(images)).float().cpu()


def lpips_backbone_file(net: str) -> Path:
    """Where torchvision keeps the backbone's weights once they were downloaded."""
    return Path(torch.hub.get_dir(), "checkpoints", _backbone_url(net).rsplit("/", 1)[-1])


def _backbone_url(net: str) -> str:
    from torchvision import models

    weights = {
        "alex": models.AlexNet_Weights.IMAGENET1K_V1,
        "vgg": models.VGG16_Weights.IMAGENET1K_V1,
        "squeeze": models.SqueezeNet1_1_Weights.IMAGENET1K_V1,
    }
    return weights[net].url


def load_lpips(net: str = "alex", *, download: bool = False, device: torch.device | str = "cpu") -> Lpips:
    """LPIPS with the backbone ``net`` from the torch hub cache, or fetched there when ``download``.

    Raises:  ModelError when the weights are neither in the cache nor to be had; ValueError for another net.
    """
    if net not in LPIPS_NETS:
        raise ValueError(f"net is {net!r}; expected one of {', '.join(LPIPS_NETS)}")
    file = lpips_backbone_file(net)
    if not file.is_file():
        if not download:
            raise ModelError(
                f"LPIPS is left out: its {net} backbone is not at {file}. "
                "Give --lpips-download to fetch it once, or copy the file there."
            )
        _download(_backbone_url(net), file)
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchvision: lpips still says `pretrained=`
        model = lpips.LPIPS(net=net, verbose=False)
    return Lpips(model, net, torch.device(device))


def _download(url: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # seconds without a byte; a dead network must not hang the bench
    try:
        digest = file.stem.rsplit("-", 1)[-1]
        torch.hub.download_url_to_file(url, str(file), hash_prefix=digest, progress=False)
    except (OSError, urllib.error.URLError, RuntimeError) as error:
        raise ModelError(f"LPIPS: {url} could not be fetched to {file} ({error}).") from None
    finally:
        socket.setdefaulttimeout(before)


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
    return Estimate(mean, float(stdtrit(n - 1, 0.975)) * math.sqrt(variance / n), n)


@dataclass(frozen=True)
class CodebookFigures:
    """How much of the codebook the token ids of all images use."""

    codebook_size: int  # K
    tokens: int  # ids counted; at most this many codes can be used
    distinct: int
    usage: float  # distinct / K, in [0, 1]
    perplexity: float  # exp of the entropy, in [1, K]
    entropy_bits: float  # bits a token would cost under an ideal order-0 code; log2 K when all codes are as likely


class CodebookCounter:
    """Counts token ids over batches."""

    def __init__(self, codebook_size: int) -> None:
        self._counts = torch.zeros(codebook_size, dtype=torch.int64)

    def add(self, token_ids: Tensor) -> None:
        """Count ``token_ids``, integers in [0, K) of any shape."""
        self._counts += torch.bincount(token_ids.flatten().cpu(), minlength=len(self._counts))

    def figures(self) -> CodebookFigures:
        """Usage, perplexity and entropy of all ids so far (at least one)."""
        total, size = int(self._counts.sum()), len(self._counts)
        p = self._counts[self._counts > 0].double() / total
        entropy = abs(float(-(p * p.log()).sum()))  # nats; abs: a single code gives -0.0
        return CodebookFigures(size, total, len(p), len(p) / size, math.exp(entropy), entropy / math.log(2))


def bits_per_pixel(bytes_per_image: float, height: int, width: int) -> float:
    """Bits per pixel of an image of ``height`` x ``width`` that takes ``bytes_per_image``."""
    return 8 * bytes_per_image / (height * width)


def token_bytes(tokens_per_image: int, codebook_size: int) -> int:
    """Bytes that hold ``tokens_per_image`` ids of ceil(log2 K) bits: 256 ids of 16,384 codes take 448."""
    return math.ceil(tokens_per_image * max(1, math.ceil(math.log2(codebook_size))) / 8)
