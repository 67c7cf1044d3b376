"""What the bench compares: the tokenizer at some settings, its autoencoder alone, a codec at the same bytes.

A system is anything that turns a ``Batch`` into 8-bit pictures and their sizes, so another tokenizer needs
one function to stand beside these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from v2flow_cli.bench.codecs import Codec, best_at
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.preprocess import to_uint8


@dataclass(frozen=True)
class Batch:
    """What to reconstruct: images (B, 3, S, S) in [-1, 1]; reference (B, S, S, 3) uint8; token_ids (B, L)."""

    images: Tensor
    reference: Tensor
    token_ids: Tensor
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class System:
    """A named way to reconstruct: pictures (B, S, S, 3) uint8 and the bytes of each (None: not coded)."""

    name: str
    reconstruct: Callable[[Batch], tuple[Tensor, Sequence[int] | None]]
    settings: Mapping[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def inference(tokenizer: V2FlowTokenizer, dtype: torch.dtype) -> Iterator[None]:
    """No gradients, and products in ``dtype``, as the commands encode and decode."""
    kind = tokenizer.device.type
    with torch.inference_mode(), torch.autocast(kind, dtype, enabled=dtype != torch.float32):
        yield


def tokenizer_system(
    tokenizer: V2FlowTokenizer,
    name: str,
    bytes_per_image: int,
    *,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> System:
    """The tokenizer itself; ``settings`` are keyword arguments of ``decode``, None for the model's own."""

    def reconstruct(batch: Batch) -> tuple[Tensor, Sequence[int]]:
        height, width = batch.images.shape[-2:]
        with inference(tokenizer, dtype):
            images = tokenizer.decode(batch.token_ids, height=height, width=width, seeds=batch.seeds, **settings)
        return to_uint8(images), [bytes_per_image] * len(images)

    given = {key: value for key, value in settings.items() if value is not None}
    return System(name, reconstruct, {**(tokenizer.config.sampling or {}), **given})


def autoencoder_system(tokenizer: V2FlowTokenizer, *, dtype: torch.dtype = torch.float32) -> System:
    """The autoencoder without tokens: the ceiling of every setting."""

    def reconstruct(batch: Batch) -> tuple[Tensor, None]:
        with inference(tokenizer, dtype):
            return to_uint8(tokenizer.autoencode(batch.images)), None

    return System("autoencoder alone", reconstruct)


def codec_system(codec: Codec, budget: int) -> System:
    """A codec at no more than ``budget`` bytes an image."""

    def reconstruct(batch: Batch) -> tuple[Tensor, Sequence[int]]:
        results = [best_at(codec, reference, budget) for reference in batch.reference.numpy()]
        return torch.from_numpy(np.stack([r.pixels for r in results])), [r.bytes for r in results]

    return System(codec.name, reconstruct, {"byte_budget": budget, **codec.options})
