"""One pass over the images: every system reconstructs each batch, every figure is taken per image."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from v2flow_cli.bench import metrics
from v2flow_cli.bench.protocol import Protocol, library_versions
from v2flow_cli.bench.systems import Batch, System, inference
from v2flow_cli.errors import DataError
from v2flow_cli.store.decode_set import image_seed
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.preprocess import to_uint8


@dataclass(frozen=True)
class ImageFigures:
    """One system on one image.  psnr in dB; bytes and lpips None where there are none."""

    image: str
    system: str
    bytes: int | None
    psnr: float
    ssim: float
    lpips: float | None


@dataclass(frozen=True)
class Row:
    """One system over all images."""

    system: str
    settings: Mapping[str, Any]
    bytes_per_image: float | None
    bits_per_pixel: float | None
    psnr: metrics.Estimate
    ssim: metrics.Estimate
    lpips: metrics.Estimate | None


@dataclass(frozen=True)
class KeptImage:
    """What the report shows of an image: reference and systems' pictures (S, S, 3) uint8, token_ids (L,)."""

    name: str
    reference: np.ndarray
    token_ids: np.ndarray
    pictures: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Result:
    """Everything one bench measured."""

    protocol: Protocol
    rows: tuple[Row, ...]
    images: tuple[ImageFigures, ...]
    codebook: metrics.CodebookFigures
    tokens_per_image: int
    kept: tuple[KeptImage, ...]

    def figures_of(self, image: str, system: str) -> ImageFigures:
        return next(f for f in self.images if f.image == image and f.system == system)


def evaluate(
    tokenizer: V2FlowTokenizer,
    photos: Iterable[tuple[str, Image.Image]],
    systems: Sequence[System],
    *,
    size: int,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    lpips: metrics.Lpips | None = None,
    lpips_note: str = "not measured",
    keep: int = 0,
    tick: Callable[[int], None] = lambda advance: None,
) -> Result:
    """Figures of every system on every photo; memory holds one batch, the figures, and ``keep`` images.

    Args:    photos, (name, RGB image) pairs with distinct names; size in pixels; an image is decoded
             from ``image_seed(seed, name)``, as the decode command does.
    Raises:  DataError when there is no photo.
    """
    figures: list[ImageFigures] = []
    kept: list[KeptImage] = []
    counter = metrics.CodebookCounter(tokenizer.config.codebook_size)
    digest = hashlib.sha256()
    count = 0
    for names, batch in _batches(tokenizer, photos, size, batch_size, dtype, seed):
        counter.add(batch.token_ids)
        digest.update(batch.reference.numpy().tobytes())
        pictures, measured = {}, []
        for system in systems:
            pictures[system.name], sizes = system.reconstruct(batch)
            measured.append(_measure(names, system.name, batch.reference, pictures[system.name], sizes, lpips))
        figures += [f for of_image in zip(*measured) for f in of_image]
        for i in range(min(len(names), keep - len(kept))):
            shown = {system: images[i].numpy() for system, images in pictures.items()}
            ids = batch.token_ids[i].cpu().numpy()
            kept.append(KeptImage(names[i], batch.reference[i].numpy(), ids, shown))
        count += len(names)
        tick(len(names))
    if not count:
        raise DataError("No image could be read, so there is nothing to measure.")
    protocol = Protocol(
        image_size=size,
        count=count,
        reference_digest=digest.hexdigest()[:16],
        lpips=f"lpips package, {lpips.net} backbone, v0.1, 8-bit images in [-1, 1]" if lpips else lpips_note,
        seed=seed,
        versions=library_versions(),
    )
    codebook = counter.figures()
    rows = tuple(_row(system, [f for f in figures if f.system == system.name], size) for system in systems)
    return Result(protocol, rows, tuple(figures), codebook, codebook.tokens // count, tuple(kept))


def _batches(
    tokenizer: V2FlowTokenizer,
    photos: Iterable[tuple[str, Image.Image]],
    size: int,
    batch_size: int,
    dtype: torch.dtype,
    seed: int,
) -> Iterator[tuple[list[str], Batch]]:
    stream = iter(photos)
    while chunk := list(itertools.islice(stream, batch_size)):
        names = [name for name, _ in chunk]
        images = torch.stack([tokenizer.image_processor.preprocess_one(image, size) for _, image in chunk])
        reference = to_uint8(images)
        images = images.to(tokenizer.device)
        with inference(tokenizer, dtype):
            token_ids = tokenizer.encode(images)
        yield names, Batch(images, reference, token_ids, tuple(image_seed(seed, name) for name in names))


def _measure(
    names: Sequence[str],
    system: str,
    reference: Tensor,
    pictures: Tensor,
    sizes: Sequence[int] | None,
    lpips: metrics.Lpips | None,
) -> Iterator[ImageFigures]:
    psnr, ssim = metrics.psnr(reference, pictures).tolist(), metrics.ssim(reference, pictures).tolist()
    distances = lpips(reference, pictures).tolist() if lpips else [None] * len(names)
    for i, name in enumerate(names):
        yield ImageFigures(name, system, sizes[i] if sizes else None, psnr[i], ssim[i], distances[i])


def _row(system: System, figures: Sequence[ImageFigures], size: int) -> Row:
    sizes = [f.bytes for f in figures if f.bytes is not None]
    distances = [f.lpips for f in figures if f.lpips is not None]
    mean_bytes = sum(sizes) / len(sizes) if sizes else None
    return Row(
        system.name,
        system.settings,
        mean_bytes,
        None if mean_bytes is None else metrics.bits_per_pixel(mean_bytes, size, size),
        metrics.estimate([f.psnr for f in figures]),
        metrics.estimate([f.ssim for f in figures]),
        metrics.estimate(distances) if distances else None,
    )
