"""One pass over the images: every system reconstructs each batch, every figure is taken per image."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from v2flow_cli.bench import metrics
from v2flow_cli.bench.candidates import Batch, Reconstruction, System
from v2flow_cli.bench.perceptual import FrechetDistance, Inception, Lpips
from v2flow_cli.bench.protocol import Protocol, library_versions
from v2flow_cli.errors import DataError
from v2flow_cli.jobs.decode import image_seed
from v2flow_cli.runtime.processes import Processes, gather_texts
from v2flow_cli.tokenizer.preprocess import image_to_tensor, to_uint8


@dataclass(frozen=True)
class Judges:
    """The networks that judge, None where their weights are missing, and one note for each that is."""

    lpips: Lpips | None = None
    inception: Inception | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageFigures:
    """One system on one image.  psnr in dB; None where there is no such figure."""

    image: str
    system: str
    bytes: int | None
    psnr: float
    ssim: float
    ms_ssim: float | None
    lpips: float | None


@dataclass(frozen=True)
class Row:
    """One system over all images; means of the single images, but rfid, which is of the whole set."""

    system: str
    kind: str  # tokenizer, external, autoencoder or codec
    family: str
    settings: Mapping[str, Any]
    weights_digest: str | None
    tokens_per_image: int | None
    bytes_per_image: float | None
    bits_per_pixel: float | None
    psnr: metrics.Estimate
    ssim: metrics.Estimate
    ms_ssim: metrics.Estimate | None
    lpips: metrics.Estimate | None
    rfid: float | None
    codebook: metrics.CodebookFigures | None

    @property
    def entropy_bytes(self) -> float | None:
        """Bytes an image under the ideal order-0 code of the ids."""
        return None if self.codebook is None else self.codebook.entropy_bits * (self.tokens_per_image or 0) / 8


@dataclass(frozen=True)
class KeptImage:
    """What the report shows of an image: reference and systems' pictures (S, S, 3) uint8, ids (L,) by system."""

    name: str
    reference: np.ndarray
    pictures: Mapping[str, np.ndarray]
    token_ids: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Result:
    """Everything one pass measured: one protocol, one table."""

    protocol: Protocol
    rows: tuple[Row, ...]
    images: tuple[ImageFigures, ...]
    kept: tuple[KeptImage, ...]

    @property
    def coders(self) -> tuple[Row, ...]:
        """The rows that are tokenizers."""
        return tuple(row for row in self.rows if row.codebook)

    def figures_of(self, image: str, system: str) -> ImageFigures:
        return next(f for f in self.images if f.image == image and f.system == system)


@dataclass
class _Sums:
    """What is gathered of one system over the batches."""

    system: System
    counter: metrics.CodebookCounter | None
    distance: FrechetDistance | None
    figures: list[ImageFigures] = field(default_factory=list)
    tokens: int | None = None


def evaluate(
    photos: Iterable[tuple[str, Image.Image]],
    systems: Sequence[System],
    *,
    size: int,
    batch_size: int,
    seed: int = 0,
    judges: Judges = Judges(),
    keep: int = 0,
    ranks: Processes = Processes(),  # noqa: B008  frozen
    tick: Callable[[int], None] = lambda advance: None,
) -> Result:
    """Figures of every system on every photo; memory holds one batch, the figures, and ``keep`` images.

    Of several ``ranks`` each reads all photos and reconstructs every so many-th batch; all return the same figures, and
    the first one also what is kept.

    Args:    photos, (name, RGB image) pairs with distinct names; size in pixels; an image is decoded
             from ``image_seed(seed, name)``, as the decode command does.
    Raises:  DataError when there is no photo.
    """
    sums = [
        _Sums(
            system,
            metrics.CodebookCounter(system.codebook_size) if system.codebook_size else None,
            FrechetDistance() if judges.inception else None,
        )
        for system in systems
    ]
    kept: list[KeptImage] = []
    digest = hashlib.sha256()
    count = 0
    for number, (names, batch) in enumerate(batches(photos, size, batch_size, seed)):
        digest.update(batch.reference.numpy().tobytes())
        count += len(names)
        tick(len(names))
        mine, shown = number % ranks.count == ranks.rank, ranks.rank == 0 and len(kept) < keep
        if not (mine or shown):
            continue
        features = judges.inception(batch.reference) if judges.inception else None
        made = {}
        for of_system in sums:
            out = made[of_system.system.name] = of_system.system.reconstruct(batch)
            if not mine:
                continue
            of_system.figures += _measure(names, of_system.system.name, batch.reference, out, judges.lpips)
            if of_system.counter and out.token_ids is not None:
                of_system.counter.add(out.token_ids)
                of_system.tokens = out.token_ids.shape[1]
            if of_system.distance and judges.inception and features is not None:
                of_system.distance.add(features, judges.inception(out.pictures))
        for i in range(min(len(names), keep - len(kept)) if shown else 0):
            pictures = {name: out.pictures[i].numpy() for name, out in made.items()}
            ids = {name: out.token_ids[i].numpy() for name, out in made.items() if out.token_ids is not None}
            kept.append(KeptImage(names[i], batch.reference[i].numpy(), pictures, ids))
    if not count:
        raise DataError("No image could be read, so there is nothing to measure.")
    for of_system in sums:
        _share(of_system, ranks, batch_size)
    protocol = Protocol(
        image_size=size,
        count=count,
        reference_digest=digest.hexdigest()[:16],
        lpips=judges.lpips.definition if judges.lpips else None,
        rfid=judges.inception.definition if judges.inception else None,
        seed=seed,
        versions=library_versions(),
    )
    images = tuple(figures for of_image in zip(*(s.figures for s in sums)) for figures in of_image)
    return Result(protocol, tuple(_row(s, size, count) for s in sums), images, tuple(kept))


def _share(sums: _Sums, ranks: Processes, batch_size: int) -> None:
    """Give every rank what all ranks have gathered, in the order of the photos."""
    if ranks.count == 1:
        return
    mine = {"tokens": sums.tokens, "figures": [astuple(figures) for figures in sums.figures]}
    told = [json.loads(text) for text in gather_texts(json.dumps(mine))]
    sums.tokens = next((each["tokens"] for each in told if each["tokens"] is not None), None)
    parts = [[ImageFigures(*values) for values in each["figures"]] for each in told]
    sums.figures = []
    for first in range(0, max(map(len, parts)), batch_size):
        for part in parts:
            sums.figures += part[first : first + batch_size]
    if sums.counter:
        sums.counter.share(ranks.sum)


def batches(
    photos: Iterable[tuple[str, Image.Image]], size: int, batch_size: int, seed: int = 0
) -> Iterator[tuple[list[str], Batch]]:
    """(names, batch) of the photos at ``size`` pixels, through the one crop of the product."""
    stream = iter(photos)
    while chunk := list(itertools.islice(stream, batch_size)):
        names = [name for name, _ in chunk]
        images = torch.stack([image_to_tensor(image, size) for _, image in chunk])
        yield names, Batch(images, to_uint8(images), tuple(image_seed(seed, name) for name in names))


def _measure(
    names: Sequence[str], system: str, reference: Tensor, made: Reconstruction, lpips: Lpips | None
) -> Iterator[ImageFigures]:
    pictures, nothing = made.pictures, [None] * len(names)
    psnr, ssim = metrics.psnr(reference, pictures).tolist(), metrics.ssim(reference, pictures).tolist()
    scales = metrics.ms_ssim(reference, pictures)
    ms_ssim = nothing if scales is None else scales.tolist()
    distances = lpips(reference, pictures).tolist() if lpips else nothing
    sizes = made.bytes or nothing
    for figures in zip(names, sizes, psnr, ssim, ms_ssim, distances):
        yield ImageFigures(figures[0], system, *figures[1:])


def _row(sums: _Sums, size: int, count: int) -> Row:
    system, figures = sums.system, sums.figures
    sizes = [f.bytes for f in figures if f.bytes is not None]
    mean_bytes = sum(sizes) / len(sizes) if sizes else None
    return Row(
        system.name,
        system.kind,
        system.family,
        system.settings,
        system.weights_digest,
        sums.tokens,
        mean_bytes,
        None if mean_bytes is None else metrics.bits_per_pixel(mean_bytes, size, size),
        metrics.estimate([f.psnr for f in figures]),
        metrics.estimate([f.ssim for f in figures]),
        _mean(f.ms_ssim for f in figures),
        _mean(f.lpips for f in figures),
        sums.distance.value(count) if sums.distance else None,
        sums.counter.figures() if sums.counter else None,
    )


def _mean(values: Iterable[float | None]) -> metrics.Estimate | None:
    known = [value for value in values if value is not None]
    return metrics.estimate(known) if known else None
