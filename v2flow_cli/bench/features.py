"""Feature vectors of pictures, for nearest neighbours and distances.

Pictures here are 8-bit tensors (B, H, W, 3).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from v2flow_cli.errors import ModelError, foreign_errors
from v2flow_cli.tokenizer.preprocess import from_uint8
from v2flow_cli.training.perceptual import FeatureNetwork, load_features


class FeatureSpace(Protocol):
    """Pictures (B, H, W, 3) uint8 -> unit vectors (B, D) float32 on the CPU."""

    definition: str

    def __call__(self, pictures: Tensor) -> Tensor: ...


class NetworkSpace:
    """A backbone's last five blocks, each averaged in four quarters and normalised, concatenated.

    With SqueezeNet 1.1, the nearest of 1,393 drawings had the same title for 67% of 264 drawings by another artist;
    means of whole blocks gave 62%.
    """

    def __init__(self, network: FeatureNetwork, device: torch.device | str = "cpu") -> None:
        self.network, self._device = network.to(device), torch.device(device)
        self.definition = f"{network.definition}; means of four quarters in its last five blocks"

    def __call__(self, pictures: Tensor) -> Tensor:
        images = from_uint8(pictures.to(self._device))
        with torch.inference_mode():
            blocks = self.network.blocks(images)[-5:]
            blocks = [F.normalize(F.adaptive_avg_pool2d(block, 2).flatten(1), dim=1) for block in blocks]
        return F.normalize(torch.cat(blocks, dim=1), dim=1).cpu()


class ClipSpace:
    """The image embedding of a CLIP model."""

    def __init__(self, path_or_id: str, device: torch.device | str = "cpu") -> None:
        """Raises:  ModelError for anything that is not a CLIP model with its image processor."""
        from transformers import AutoImageProcessor, AutoModel

        with foreign_errors(f"{path_or_id}: not a loadable CLIP model"):
            self.processor: Any = AutoImageProcessor.from_pretrained(path_or_id)
            model: Any = AutoModel.from_pretrained(path_or_id)
        if not hasattr(model, "get_image_features"):
            raise ModelError(f"{path_or_id}: {type(model).__name__} has no image embedding; expected a CLIP model.")
        self.model, self._device = model.to(device).eval(), torch.device(device)
        self.definition = f"image embedding of {path_or_id}"

    def __call__(self, pictures: Tensor) -> Tensor:
        pixels = self.processor(images=list(pictures.cpu().numpy()), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            features = self.model.get_image_features(pixel_values=pixels.to(self._device))
        # A tensor, or an output object that contains it, depending on the version of transformers.
        features = features if isinstance(features, Tensor) else features.pooler_output
        return F.normalize(features.float(), dim=1).cpu()


def load_space(features: str, device: torch.device | str = "cpu") -> FeatureSpace:
    """The space of a safetensors file of a backbone's features, or of a CLIP model by folder or hub id.

    Raises:  ModelError for anything else.
    """
    if features.endswith(".safetensors") or Path(features).is_file():
        return NetworkSpace(load_features(features), device)
    return ClipSpace(features, device)
