"""Weights of the networks that compare images: found, and checked against the hash in their name."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

import torch

from v2flow_cli.errors import ModelError
from v2flow_cli.runtime.extras import extra
from v2flow_cli.store.files import sha256_of

LPIPS_NETS = ("alex", "vgg", "squeeze")
INCEPTION = "inception"


@dataclass(frozen=True)
class JudgeWeights:
    """The search path of weights: ``folder`` first, then torch hub's cache; ``download`` fetches into the cache."""

    folder: Path | None = None
    download: bool = False

    def find(self, name: str) -> Path:
        """The file of ``alex``, ``vgg``, ``squeeze`` or ``inception``, its SHA-256 checked against its name.

        Raises:  ModelError if it is missing, cannot be downloaded, or has another SHA-256.
        """
        url = weights_url(name)
        file_name = url.rsplit("/", 1)[-1]
        cached = Path(torch.hub.get_dir(), "checkpoints", file_name)
        paths = [*([self.folder / file_name] if self.folder else []), cached]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            if not self.download:
                raise ModelError(
                    f"{_label(name)}: its weights are not at {' or '.join(map(str, paths))}. Use --download to fetch "
                    f"them once, or --weights FOLDER with {file_name} in it."
                )
            _download(name, url, cached)
            path = cached
        expected, digest = file_name.rsplit("-", 1)[-1].removesuffix(".pth"), sha256_of(path)
        if not digest.startswith(expected):
            raise ModelError(
                f"{_label(name)}: {path} has SHA-256 {digest[:8]}, expected {expected}. Delete it and use --download, "
                "or copy the right file there."
            )
        return path


def weights_url(name: str) -> str:
    """The address of the published weights.  Raises: ValueError for another name."""
    if name == INCEPTION:
        with extra("metrics", "torch_fidelity", "rFID"):
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        return URL_INCEPTION_V3
    if name not in LPIPS_NETS:
        raise ValueError(f"net is {name!r}; expected one of {', '.join(LPIPS_NETS)}")
    with extra("metrics", "torchvision", f"LPIPS ({name})"):
        from torchvision import models
    weights = {
        "alex": models.AlexNet_Weights.IMAGENET1K_V1,
        "vgg": models.VGG16_Weights.IMAGENET1K_V1,
        "squeeze": models.SqueezeNet1_1_Weights.IMAGENET1K_V1,
    }
    return weights[name].url


def _label(name: str) -> str:
    return "rFID (Inception v3)" if name == INCEPTION else f"LPIPS ({name})"


def _download(name: str, url: str, file: Path) -> None:
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # seconds without a byte, so that a dead network does not block the bench
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), progress=False)  # through a temporary file
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        raise ModelError(f"{_label(name)}: {url} could not be fetched to {file} ({error}).") from None
    finally:
        socket.setdefaulttimeout(timeout)
