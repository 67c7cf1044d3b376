"""One pass over the images: every system reconstructs each batch, and figures are computed per image."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from v2flow_cli.bench.candidates import Batch, Reconstruction, System
from v2flow_cli.bench.codebook_use import CodebookCounter, CodebookFigures
from v2flow_cli.bench.codec_speed import Speed
from v2flow_cli.bench.metrics import METRICS, Estimate, SetMetric, SystemFacts, estimate
from v2flow_cli.bench.networks import MetricNetworks
from v2flow_cli.bench.protocol import Protocol, library_versions
from v2flow_cli.errors import DataError
from v2flow_cli.jobs.decode import image_seed
from v2flow_cli.runtime.processes import Processes, gather_texts
from v2flow_cli.tokenizer.preprocess import fitted_size, image_to_tensor, to_uint8


@dataclass(frozen=True)
class ImageFigures:
    """One system on one image; ``values`` by the key of every metric of images, None if missing."""

    image: str
    system: str
    bytes: int | None
    values: Mapping[str, float | None]


WHOLE_PICTURE = (
    "whole picture at the size nearest to image_size squared and to its shape in multiples of {} pixels (Pillow "
    "bicubic, antialiased), centre"
)  # the protocol's crop if pictures keep their shapes


@dataclass(frozen=True)
class Row:
    """One system over all images; ``values`` by the key of every metric: an Estimate for metrics of images."""

    system: str
    kind: str  # tokenizer, external, autoencoder or codec
    family: str
    settings: Mapping[str, Any]
    weights_digest: str | None
    tokens_per_image: float | None  # on average
    bytes_per_image: float | None
    codebook: CodebookFigures | None
    speed: Speed | None
    values: Mapping[str, Estimate | float | None]


@dataclass(frozen=True)
class KeptImage:
    """An image for the report: reference and systems' pictures (S, S, 3) uint8, ids (L,) by system."""

    name: str
    reference: np.ndarray
    pictures: Mapping[str, np.ndarray]
    token_ids: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Result:
    """The result of one pass: one protocol, one table."""

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
    """The sums of one system over the batches."""

    system: System
    counter: CodebookCounter | None
    of_set: dict[str, SetMetric]  # by key
    figures: list[ImageFigures] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # of each image

    @property
    def mean_tokens(self) -> float | None:
        """Tokens per image; an int if it is a whole number."""
        if not self.tokens:
            return None
        mean = sum(self.tokens) / len(self.tokens)
        return int(mean) if mean.is_integer() else mean


def evaluate(
    photos: Iterable[tuple[str, Image.Image]],
    systems: Sequence[System],
    *,
    size: int,
    batch_size: int,
    multiple: int | None = None,
    seed: int = 0,
    networks: MetricNetworks = MetricNetworks(),  # noqa: B008  frozen
    speeds: Mapping[str, Speed] = MappingProxyType({}),
    keep: int = 0,
    ranks: Processes = Processes(),  # noqa: B008  frozen
    tick: Callable[[int], None] = lambda advance: None,
) -> Result:
    """Figures of every system on every photo; memory holds one batch, the figures, and ``keep`` images.

    Each of several ``ranks`` reads all photos and reconstructs its share of the batches; all return the same figures,
    and the first one also the images for the report.

    Args:    photos, (name, RGB image) pairs with distinct names; size in pixels, and multiple, as ``batches`` takes
             them; seed: an image is decoded from ``image_seed(seed, name)``, as by the decode command; speeds, by
             system, if they were measured; keep, the number of images for the report.
    Raises:  DataError if there is no photo.
    """
    sums = [_start(system, networks) for system in systems]
    kept: list[KeptImage] = []
    digest = hashlib.sha256()
    count, pixels = 0, 0
    chunks = enumerate(batches(photos, size, batch_size, seed, multiple))
    parts = ((number, *part) for number, chunk in chunks for part in chunk)
    for number, names, batch in parts:
        digest.update(batch.reference.numpy().tobytes())
        count += len(names)
        pixels += batch.reference.shape[:3].numel()
        tick(len(names))
        measured, shown = number % ranks.count == ranks.rank, ranks.rank == 0 and len(kept) < keep
        if not (measured or shown):
            continue
        outputs = {}
        for of_system in sums:
            out = outputs[of_system.system.name] = of_system.system.reconstruct(batch)
            if not measured:
                continue
            of_system.figures += _measure(names, of_system.system.name, batch.reference, out, networks)
            for metric in of_system.of_set.values():
                metric.add(batch, out.pictures)
            if of_system.counter and out.token_ids is not None:
                of_system.counter.add(out.token_ids)
                of_system.tokens += [out.token_ids.shape[1]] * len(names)
        for i in range(min(len(names), keep - len(kept)) if shown else 0):
            pictures = {name: out.pictures[i].numpy() for name, out in outputs.items()}
            ids = {name: out.token_ids[i].numpy() for name, out in outputs.items() if out.token_ids is not None}
            kept.append(KeptImage(names[i], batch.reference[i].numpy(), pictures, ids))
    if not count:
        raise DataError("No image could be read.")
    for of_system in sums:
        _share(of_system, ranks, batch_size)
    protocol = Protocol(
        image_size=size,
        **({} if multiple is None else {"crop": WHOLE_PICTURE.format(multiple)}),
        count=count,
        reference_digest=digest.hexdigest()[:16],
        lpips=networks.lpips.definition if networks.lpips else None,
        rfid=networks.inception.definition if networks.inception else None,
        features=networks.features.definition if networks.features else None,
        seed=seed,
        versions=library_versions(),
    )
    images = tuple(figures for of_image in zip(*(s.figures for s in sums)) for figures in of_image)
    return Result(
        protocol, tuple(_row(s, pixels / count, count, speeds.get(s.system.name)) for s in sums), images, tuple(kept)
    )


def _share(sums: _Sums, ranks: Processes, batch_size: int) -> None:
    """Give every rank the sums of all ranks, in the order of the photos."""
    if ranks.count == 1:
        return
    record = {"tokens": sums.tokens, "figures": [astuple(figures) for figures in sums.figures]}
    parts_of_all = [json.loads(text) for text in gather_texts(json.dumps(record))]
    sums.tokens = [count for each in parts_of_all for count in each["tokens"]]
    parts = [[ImageFigures(*values) for values in each["figures"]] for each in parts_of_all]
    sums.figures = []
    for first in range(0, max(map(len, parts)), batch_size):
        for part in parts:
            sums.figures += part[first : first + batch_size]
    if sums.counter:
        sums.counter.share(ranks.sum)


def batches(
    photos: Iterable[tuple[str, Image.Image]], size: int, batch_size: int, seed: int = 0, multiple: int | None = None
) -> Iterator[list[tuple[list[str], Batch]]]:
    """The photos, ``batch_size`` at a time, as (names, batch) for each size among them.

    Args:  size, side in pixels of the centre crop; with ``multiple`` pictures keep their shapes, with the area of that
           square and sides that are multiples of ``multiple`` pixels.
    """
    stream = iter(photos)
    while chunk := list(itertools.islice(stream, batch_size)):
        of_size: dict[tuple[int, int], list[tuple[str, Image.Image]]] = {}
        for name, image in chunk:
            shape = fitted_size(*image.size, size, multiple) if multiple else (size, size)
            of_size.setdefault(shape, []).append((name, image))
        yield [_batch(images, shape, seed) for shape, images in of_size.items()]


def _batch(photos: Sequence[tuple[str, Image.Image]], size: tuple[int, int], seed: int) -> tuple[list[str], Batch]:
    names = [name for name, _ in photos]
    images = torch.stack([image_to_tensor(image, size) for _, image in photos])
    return names, Batch(images, to_uint8(images), tuple(image_seed(seed, name) for name in names))


def _start(system: System, networks: MetricNetworks) -> _Sums:
    counter = CodebookCounter(system.codebook_size) if system.codebook_size else None
    of_set = {metric.key: metric.of_set(networks) for metric in METRICS if metric.of_set}
    return _Sums(system, counter, {key: metric for key, metric in of_set.items() if metric is not None})


def _measure(
    names: Sequence[str], system: str, reference: Tensor, out: Reconstruction, networks: MetricNetworks
) -> Iterator[ImageFigures]:
    columns: dict[str, Sequence[float | None]] = {}
    for metric in METRICS:
        if metric.of_images:
            values = metric.of_images(reference, out.pictures, networks)
            columns[metric.key] = [None] * len(names) if values is None else values.tolist()
    for i, name in enumerate(names):
        yield ImageFigures(
            name, system, out.bytes[i] if out.bytes else None, {key: column[i] for key, column in columns.items()}
        )


def _row(sums: _Sums, pixels: float, count: int, speed: Speed | None) -> Row:
    system, figures = sums.system, sums.figures
    sizes = [f.bytes for f in figures if f.bytes is not None]
    mean_bytes = sum(sizes) / len(sizes) if sizes else None
    codebook = sums.counter.figures() if sums.counter else None
    facts = SystemFacts(pixels, sums.mean_tokens, mean_bytes, codebook, speed)
    values: dict[str, Estimate | float | None] = {}
    for metric in METRICS:
        if metric.of_images:
            known = [value for f in figures if (value := f.values[metric.key]) is not None]
            values[metric.key] = estimate(known) if known else None
        elif metric.of_system:
            values[metric.key] = metric.of_system(facts)
        else:
            values[metric.key] = sums.of_set[metric.key].value(count) if metric.key in sums.of_set else None
    return Row(
        system.name,
        system.kind,
        system.family,
        system.settings,
        system.weights_digest,
        sums.mean_tokens,
        mean_bytes,
        codebook,
        speed,
        values,
    )
