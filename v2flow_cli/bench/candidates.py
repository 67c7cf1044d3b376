"""The systems that the bench compares: tokenizers at some settings, their autoencoders alone, codecs at equal bytes.

A system turns a ``Batch`` into 8-bit pictures and their sizes; all systems are measured in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from v2flow_cli.bench.codebook_use import token_bytes
from v2flow_cli.bench.codecs import Codec, best_at
from v2flow_cli.bench.coder import Coder
from v2flow_cli.runtime.device import inference
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.preprocess import to_uint8


@dataclass(frozen=True)
class Batch:
    """Images (B, 3, S, S) in [-1, 1] to reconstruct; their 8-bit reference (B, S, S, 3); a seed for each."""

    images: Tensor
    reference: Tensor
    seeds: tuple[int, ...]
    features: dict[str, Tensor] = field(default_factory=dict)  # of the reference, by network
    codes: dict[str, Tensor] = field(default_factory=dict)  # ids (B, L) by source

    def token_ids(self, coder: Coder) -> Tensor:
        if coder.source not in self.codes:
            self.codes[coder.source] = coder.encode(self.images.to(coder.device)).cpu()
        return self.codes[coder.source][:, : coder.tokens]


@dataclass(frozen=True)
class Reconstruction:
    """Pictures (B, S, S, 3) uint8; bytes of each, and ids (B, L), or None."""

    pictures: Tensor
    bytes: Sequence[int] | None = None
    token_ids: Tensor | None = None


@dataclass(frozen=True)
class System:
    """A way to reconstruct.  kind: tokenizer, external, autoencoder or codec; family: of the points of one curve."""

    name: str
    kind: str
    family: str
    reconstruct: Callable[[Batch], Reconstruction]
    settings: Mapping[str, Any] = field(default_factory=dict)
    codebook_size: int | None = None
    weights_digest: str | None = None


def coder_system(coder: Coder) -> System:
    """The system of a tokenizer, ours or an external one."""

    def reconstruct(batch: Batch) -> Reconstruction:
        ids = batch.token_ids(coder)
        images = coder.decode(ids.to(coder.device), batch.seeds, (batch.reference.shape[1], batch.reference.shape[2]))
        size = token_bytes(ids.shape[1], coder.codebook_size)
        return Reconstruction(to_uint8(images), [size] * len(ids), ids)

    return System(
        coder.name, coder.kind, coder.model, reconstruct, coder.settings, coder.codebook_size, coder.weights_digest
    )


def autoencoder_system(name: str, tokenizer: V2FlowTokenizer, *, dtype: torch.dtype = torch.float32) -> System:
    """The autoencoder without tokens: the upper limit of every setting."""

    def reconstruct(batch: Batch) -> Reconstruction:
        with inference(tokenizer.device, dtype):
            return Reconstruction(to_uint8(tokenizer.autoencode(batch.images.to(tokenizer.device))))

    return System(name, "autoencoder", name, reconstruct)


def codec_system(name: str, codec: Codec, budget: int) -> System:
    """A codec at no more than ``budget`` bytes an image."""

    def reconstruct(batch: Batch) -> Reconstruction:
        results = [best_at(codec, reference, budget) for reference in batch.reference.numpy()]
        return Reconstruction(torch.from_numpy(np.stack([r.pixels for r in results])), [r.bytes for r in results])

    return System(name, "codec", codec.name, reconstruct, {"byte_budget": budget, **codec.options})


def load_tokenizers(paths: Sequence[str | None], device: torch.device) -> dict[str, V2FlowTokenizer]:
    """Tokenizers by a short name: ``v2flow`` for a single one, else the last parts of the paths in which they differ.

    None is the embedded model.
    """
    paths = list(dict.fromkeys(paths))
    names = ["v2flow"] * len(paths)
    if len(paths) > 1:
        parts = [Path(path).parts if path else ("v2flow",) for path in paths]
        depth = next(d for d in range(1, 99) if len({p[-d:] for p in parts}) == len(parts))
        names = ["/".join(p[-depth:]) for p in parts]
    return {name: V2FlowTokenizer.from_pretrained(path).to(device) for name, path in zip(names, paths)}
