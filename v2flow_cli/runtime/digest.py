"""The digest of a model: 16 hex digits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def model_digest(settings: str, weights: Mapping[str, Tensor]) -> str:
    """16 hex digits over settings, names and values; weights of any type count as float32."""
    return _digest(settings, weights, torch.float32)


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """16 hex digits over names and values: which weights of an LLM a picture was drawn with.

    As bfloat16 where that keeps all values, else as float32: weights saved in bfloat16 and loaded in float32 are the
    same ones.
    """
    exact = all(torch.equal(tensor.bfloat16().to(tensor.dtype), tensor) for tensor in weights.values())
    return _digest("", weights, torch.bfloat16 if exact else torch.float32)


def _digest(text: str, weights: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    sha = hashlib.sha256(text.encode())
    for name, tensor in sorted(weights.items()):
        sha.update(name.encode())
        # The bytes of a number of any type, also () of one alone.
        sha.update(tensor.detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]
