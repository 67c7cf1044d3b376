"""The digest of a model: 16 hex digits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor


def model_digest(settings: str, weights: Mapping[str, Tensor]) -> str:
    """16 hex digits over settings, names and values; weights of any type count as float32."""
    sha = hashlib.sha256(settings.encode())
    for name, tensor in sorted(weights.items()):
        sha.update(name.encode())
        sha.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]
