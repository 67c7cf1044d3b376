"""Figures by networks: LPIPS of each image, and Frechet distances of two sets of images.

Images here are 8-bit tensors (B, H, W, 3). The networks' weights come from ``store/network_weights.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

from v2flow_cli.store.network_weights import INCEPTION, JudgeWeights
from v2flow_cli.tokenizer.preprocess import from_uint8
from v2flow_cli.training import perceptual

INCEPTION_WIDTH = 2048  # features of Inception's last pooling


class Lpips:
    """LPIPS of each image, (B,) float32 on the CPU: the `lpips` package, version 0.1 weights."""

    def __init__(self, net: str, weights: JudgeWeights, device: torch.device | str = "cpu") -> None:
        """Raises:  ModelError if the backbone is not available; ValueError for an unknown net."""
        self._device = torch.device(device)
        self._model = perceptual.Lpips(net, weights).to(self._device)
        self.definition = f"{self._model.definition}, 8-bit images in [-1, 1]"

    def __call__(self, reference: Tensor, images: Tensor) -> Tensor:
        with torch.inference_mode():
            return self._model(*(from_uint8(x.to(self._device)) for x in (reference, images))).cpu()


class Features:
    """Distance and feature vectors of images by a network of a file: see ``training.perceptual.FeatureNetwork``."""

    def __init__(self, file: str | Path, device: torch.device | str = "cpu") -> None:
        """Raises:  ModelError for a file that is not the network's."""
        self._device = torch.device(device)
        self._model = perceptual.load_features(file).to(self._device)
        self.definition = (
            f"{self._model.definition}, 8-bit images; distance: squared difference of unit features, mean over the "
            "blocks of LPIPS; Frechet distance: means of the last block"
        )

    def __call__(self, reference: Tensor, images: Tensor) -> Tensor:
        """Distances (B,) float32 on the CPU."""
        with torch.inference_mode():
            return self._model(*(from_uint8(x.to(self._device)) for x in (reference, images))).cpu()

    @property
    def width(self) -> int:
        """C of ``vectors``."""
        return self.vectors(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)).shape[1]

    def vectors(self, images: Tensor) -> Tensor:
        """(B, C) float32 on the CPU."""
        with torch.inference_mode():
            return self._model.pooled(from_uint8(images.to(self._device))).cpu()


class Inception:
    """The 2,048 features of each image that FID is defined on, (B, 2048): torch-fidelity's Inception v3."""

    definition = (
        "torchmetrics, reconstructions against their references, 2,048 features of weights-inception-2015-12-05, "
        "bilinear resize to 299 px as TensorFlow 1 does, 8-bit images; biased upwards for few images"
    )

    def __init__(self, weights: JudgeWeights, device: torch.device | str = "cpu") -> None:
        """Raises:  ModelError if the weights are not available."""
        file = weights.find(INCEPTION)  # with a checked hash, because torch-fidelity unpickles it
        self._device = torch.device(device)
        self._model = NoTrainInceptionV3(INCEPTION, [str(INCEPTION_WIDTH)], str(file), antialias=False).to(self._device)

    def __call__(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            return self._model(images.permute(0, 3, 1, 2).to(self._device)).reshape(len(images), -1).cpu()


class FrechetDistance:
    """Frechet distance of two sets of features (N, D), updated batch by batch; memory does not grow with N."""

    def __init__(self, num_features: int = INCEPTION_WIDTH) -> None:
        features: Any = nn.Identity()  # the inputs are features already
        features.num_features = num_features
        self._metric = FrechetInceptionDistance(feature=features)

    def add(self, reference: Tensor, features: Tensor) -> None:
        self._metric.update(reference, real=True)
        self._metric.update(features, real=False)

    def value(self, images: int) -> float | None:
        """The distance over all ranks; None for fewer than two ``images``, which have no covariance."""
        if images < 2:
            return None
        return max(0.0, float(self._metric.compute()))
