"""The distance of two images in the features of a trained network: LPIPS, or a network from a file.

``load_perceptual`` returns a module ``(a, b) -> distances (B,)`` of images (B, 3, H, W) in [-1, 1], with gradients: a
loss for training, and a figure for ``bench``. It is frozen, and computes in float32 also under autocast.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from v2flow_cli.errors import ModelError, foreign_errors
from v2flow_cli.runtime.device import without_autocast
from v2flow_cli.runtime.extras import extra
from v2flow_cli.store.files import sha256_of
from v2flow_cli.store.network_weights import JudgeWeights, weights_url

LPIPS, LPIPS_NET = "lpips", "vgg"  # its name in a recipe; the usual backbone for training
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, pixels in [0, 1]


@dataclass(frozen=True)
class Backbone:
    """A network of torchvision: its name there, and the layers of its ``features`` whose outputs LPIPS compares.

    min_size: pixels a side, to which smaller images are enlarged, because their last block would be empty.
    """

    name: str
    blocks: tuple[int, ...]
    min_size: int

    def features(self) -> nn.Module:
        """Its convolutional part with random weights."""
        with extra("metrics", "torchvision", "a network's features as a loss"):
            from torchvision import models
        return getattr(models, self.name)(weights=None).features


SQUEEZENET = Backbone("squeezenet1_1", (1, 4, 7, 9, 10, 11, 12), 17)
BACKBONES = (SQUEEZENET, Backbone("vgg16", (3, 8, 15, 22, 29), 16), Backbone("alexnet", (1, 4, 7, 9, 11), 31))


class FeatureNetwork(nn.Module):
    """The convolutional part of a backbone; ``forward`` is the distance of two images in its blocks.

    The distance of a block is the squared difference of its features, each position's normalised to length 1, summed
    over channels and averaged over positions; that of an image is the mean over blocks, from 0 to 4. This is
    LPIPS (arXiv 1801.03924) without its learned heads.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone = SQUEEZENET, features: nn.Module | None = None) -> None:
        """``features``: the backbone's, with weights; random ones by default."""
        super().__init__()
        self.backbone = backbone
        self.features: Any = backbone.features() if features is None else features
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)
        self.definition = f"{backbone.name} with random weights"

    def blocks(self, images: Tensor) -> list[Tensor]:
        """The outputs (B, C, h, w), float32, of the blocks for images (B, 3, H, W) in [-1, 1]."""
        outputs = []
        with without_autocast(images):
            x = ((images.float() + 1) / 2 - self.mean) / self.std
            least = self.backbone.min_size
            if min(x.shape[-2:]) < least:
                x = F.interpolate(x, [max(side, least) for side in x.shape[-2:]], mode="bilinear")
            for number, layer in enumerate(self.features[: self.backbone.blocks[-1] + 1]):
                x = layer(x)
                if number in self.backbone.blocks:
                    outputs.append(x)
        return outputs

    def pooled(self, images: Tensor) -> Tensor:
        """One vector (B, C) an image: the last block, averaged over positions."""
        return self.blocks(images)[-1].mean((2, 3))

    def distance(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """Distances (B,) of two images' ``blocks``."""
        return block_distances(a, b)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (B,) of images in [-1, 1]."""
        return self.distance(self.blocks(a), self.blocks(b))


def block_distances(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Distances (B,) of the blocks of two images: see ``FeatureNetwork``."""
    parts = [(_unit(x) - _unit(y)).square().sum(1).mean((1, 2)) for x, y in zip(a, b)]
    return torch.stack(parts).mean(0)


def _unit(features: Tensor) -> Tensor:
    # rsqrt of a sum above 0: where all features are 0, as on flat areas, a norm has no gradient.
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + 1e-10)


class Lpips(nn.Module):
    """LPIPS of the `lpips` package, version 0.1 weights; see ``store.network_weights`` for its backbone's file."""

    def __init__(self, net: str, weights: JudgeWeights) -> None:
        """Raises:  ModelError if the backbone is not available; ValueError for an unknown net."""
        super().__init__()
        with extra("metrics", "lpips", f"LPIPS ({net})"):
            import lpips
        file = weights.find(net)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # lpips uses torchvision's deprecated `pretrained=`
            self.model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        state = torch.hub.load_state_dict_from_url(
            weights_url(net),
            model_dir=str(file.parent),
            file_name=file.name,
            map_location="cpu",
            progress=False,
            weights_only=True,  # only tensors are unpickled
        )
        # lpips splits torchvision's `features` into slices and keeps the numbers of the layers.
        names = {name: re.sub(r"^slice\d+", "features", name) for name in self.model.net.state_dict()}
        self.model.net.load_state_dict({name: state[original] for name, original in names.items()})
        self.definition = f"lpips package v0.1, {net} backbone {file.name}"
        self.eval().requires_grad_(False)

    def blocks(self, images: Tensor) -> list[Tensor]:
        """The outputs (B, C, h, w), float32, of the layers that LPIPS compares, for images (B, 3, H, W) in [-1, 1]."""
        with without_autocast(images):
            return list(self.model.net(self.model.scaling_layer(images.float())))

    def distance(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """Distances (B,) of two images' ``blocks``."""
        with without_autocast(a[0]):
            parts = [head((_unit(x) - _unit(y)).square()).mean((1, 2, 3)) for head, x, y in zip(self.model.lins, a, b)]
        return torch.stack(parts).sum(0)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (B,) of images in [-1, 1]."""
        return self.distance(self.blocks(a), self.blocks(b))


def load_features(path: str | Path) -> FeatureNetwork:
    """The network of a safetensors file with torchvision's names, with or without ``features.`` before them.

    Which of ``BACKBONES`` it is follows from the names and shapes.

    Raises:  ModelError for a file that is missing, damaged, or holds another network.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such file; expected weights of a backbone's features (.safetensors).")
    with foreign_errors(f"{path}: cannot be read as safetensors"):
        path.open("rb").close()  # safetensors says of a file without permission that it does not exist
        weights = load_file(path)
    weights = {n.removeprefix("features."): w.float() for n, w in weights.items() if not n.startswith("classifier.")}
    shapes = {name: weight.shape for name, weight in weights.items()}
    for backbone in BACKBONES:
        with torch.device("meta"):  # without initial values, which would be replaced
            features = backbone.features()
        if shapes == {name: weight.shape for name, weight in features.state_dict().items()}:
            break
    else:
        names = ", ".join(backbone.name for backbone in BACKBONES)
        raise ModelError(
            f"{path}: {len(weights)} weights with other names or shapes; expected the features of {names}."
        )
    features.load_state_dict(weights, assign=True)
    with torch.device("cpu"):
        network = FeatureNetwork(backbone, features)
    network.definition = f"{backbone.name} features of {path.name}, SHA-256 {sha256_of(path)[:12]}"
    return network.eval().requires_grad_(False)


def load_perceptual(features: str) -> FeatureNetwork | Lpips:
    """The network that ``loss.features`` of a recipe names: ``lpips``, or a file for ``load_features``.

    Raises:  ModelError if it is not available.
    """
    if features != LPIPS:
        return load_features(features)
    try:
        return Lpips(LPIPS_NET, JudgeWeights())
    except ModelError as error:
        reason = str(error).partition(" Use --download")[0]
        raise ModelError(
            f"loss.features is lpips. {reason} Fetch them once with `v2flow bench --lpips-net {LPIPS_NET} --download`, "
            "or name a file of network weights."
        ) from None
