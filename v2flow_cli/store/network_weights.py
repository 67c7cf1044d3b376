"""Weights of the networks that judge pictures: found, checked against the hash in their name, or clearly missing."""

from __future__ import annotations

import hashlib
import socket
from dataclasses import dataclass
from pathlib import Path

import torch

from v2flow_cli.errors import ModelError
from v2flow_cli.runtime.extras import extra

LPIPS_NETS = ("alex", "vgg", "squeeze")
INCEPTION = "inception"


@dataclass(frozen=True)
class JudgeWeights:
    """Where to look for weights: ``folder`` first, then the torch hub cache; ``download`` fetches into the cache."""

    folder: Path | None = None
    download: bool = False

    def find(self, name: str) -> Path:
        """The file of ``alex``, ``vgg``, ``squeeze`` or ``inception``, its SHA-256 checked against its name.

        Raises:  ModelError when it is nowhere, cannot be fetched, or is not what its name says.
        """
        url = weights_url(name)
        file_name = url.rsplit("/", 1)[-1]
        cached = Path(torch.hub.get_dir(), "checkpoints", file_name)
        places = [self.folder / file_name] if self.folder else []
        found = next((place for place in (*places, cached) if place.is_file()), None)
        if found is None:
            if not self.download:
                looked = " or ".join(str(place) for place in (*places, cached))
                raise ModelError(
                    f"{_what(name)}: its weights are not at {looked}. Give --download to fetch them once, or "
                    f"--weights FOLDER with {file_name} in it."
                )
            _download(name, url, cached)
            found = cached
        expected, digest = file_name.rsplit("-", 1)[-1].removesuffix(".pth"), file_digest(found)
        if not digest.startswith(expected):
            raise ModelError(
                f"{_what(name)}: {found} is not the file that its name says (SHA-256 {digest[:8]}, expected "
                f"{expected}). Delete it and give --download, or copy the right one there."
            )
        return found


def weights_url(name: str) -> str:
    """Where the weights are published.  Raises: ValueError for another name."""
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


def file_digest(file: Path) -> str:
    """SHA-256 of a file in hex."""
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _what(name: str) -> str:
    return "rFID (Inception v3)" if name == INCEPTION else f"LPIPS ({name})"


def _download(name: str, url: str, file: Path) -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # seconds without a byte; a dead network must not hang the bench
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), progress=False)  # through a temporary file
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        raise ModelError(f"{_what(name)}: {url} could not be fetched to {file} ({error}).") from None
    finally:
        socket.setdefaulttimeout(before)
