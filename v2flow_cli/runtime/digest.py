"""The digest of a model: 16 hex digits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def model_digest(settings: str, weights: Mapping[str, Tensor]) -> str:
    """16 hex digits over settings, names and values; weights of any type count as float32."""
    sha = hashlib.sha256(settings.encode())
    for name, tensor in sorted(weights.items()):
        sha.update(name.encode())
        sha.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """16 hex digits over names and values: which weights of an LLM a picture was drawn with.

    As bfloat16 where that keeps all values, else as float32: weights saved in bfloat16 and loaded in float32 are the
    same ones.
    """
    exact = all(torch.equal(tensor.bfloat16().to(tensor.dtype), tensor) for tensor in weights.values())
    sha = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        sha.update(name.encode())
        values = tensor.detach().to("cpu", torch.bfloat16 if exact else torch.float32).contiguous()
        sha.update(values.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]
