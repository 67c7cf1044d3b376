"""Sets of tokens to PNG files: the work of ``v2flow decode``."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from v2flow_cli.errors import TokenFileError
from v2flow_cli.runtime.device import cpu_cores, inference, pick_batch_size
from v2flow_cli.store.failures import Failure
from v2flow_cli.store.files import check_absent, map_ahead, write_bytes
from v2flow_cli.store.find import InputFile
from v2flow_cli.store.images import png_bytes
from v2flow_cli.store.names import safe_key
from v2flow_cli.store.paths import names_a_picture
from v2flow_cli.store.token_file import check_finished, load_samples, load_sizes, load_token_ids, row_of
from v2flow_cli.store.token_manifest import TokenManifest, find_manifest
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.preprocess import to_pil


@dataclass(frozen=True)
class TokenRows:
    """One checked token file.  targets: a PNG for each row; sizes: height and width in pixels of each."""

    path: Path
    keys: list[str]
    targets: list[Path]
    sizes: list[tuple[int, int]]
    has_manifest: bool


@dataclass
class DecodeReport:
    """The images that a decoding wrote, and its failures."""

    images: list[Path] = field(default_factory=list)
    without_manifest: int = 0  # token files that no manifest lists
    failures: list[Failure] = field(default_factory=list)


def image_seed(seed: int, key: str) -> int:
    """The seed of one image: the same in every batch, order and process."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:7], "little")


def open_token_files(
    tokenizer: V2FlowTokenizer, files: Sequence[InputFile], out: Path, *, force: bool
) -> tuple[list[TokenRows], DecodeReport]:
    """The files that fit ``tokenizer``, and a report that lists the others.

    Args:   out, a folder, or a PNG for a single image.
    Raises: TokenFileError for the ids of another tokenizer; DataError for a PNG that exists.
    """
    report = DecodeReport()
    load, digest = functools.cache(TokenManifest.load), tokenizer.token_digest
    opened: list[TokenRows] = []
    taken: set[str] = set()
    for file in files:
        manifest = find_manifest(file.path, load)
        if manifest is not None:
            manifest.check_tokenizer(digest, file.path)
        try:
            opened.append(_open(tokenizer, file, manifest, out, taken))
        except TokenFileError as error:
            report.failures.append(Failure.of(error, file.path))
    report.without_manifest = sum(not rows.has_manifest for rows in opened)
    if names_a_picture(out, sum(len(rows.keys) for rows in opened)):
        opened = [dataclasses.replace(rows, targets=[out]) for rows in opened]
    check_absent((target for rows in opened for target in rows.targets), force)
    return opened, report


def _open(
    tokenizer: V2FlowTokenizer, file: InputFile, manifest: TokenManifest | None, out: Path, taken: set[str]
) -> TokenRows:
    """The rows of a checked file and the paths of their PNGs, whose names are added to ``taken``."""
    if manifest is None:
        check_finished(file.path)
    length, variable = (None, tokenizer.flexible) if manifest is None else manifest.lengths
    ids = load_token_ids(file.path, tokenizer.config.codebook_size, length, variable)
    rows = np.atleast_2d(ids)
    try:
        sizes = _sizes(tokenizer, file.path, rows, manifest)
    except ValueError as error:
        raise TokenFileError(
            f"{file.path}: {ids.shape[-1]} tokens an image do not fit this model ({error})."
        ) from error
    if ids.ndim == 1:
        target = out / f"{safe_key(file.key, taken)}.png"
        return TokenRows(file.path, [file.key], [target], sizes, manifest is not None)
    samples = load_samples(file.path)
    keys = [f"{i:06d}" for i in range(len(ids))] if samples is None else [key for key, _ in samples]
    if len(keys) != len(ids):
        raise TokenFileError(f"{file.path}: {len(ids)} rows, but {len(keys)} keys. Encode it again.")
    folder, folder_keys = out / safe_key(file.key, taken), set[str]()
    targets = [folder / f"{safe_key(key, folder_keys)}.png" for key in keys]
    return TokenRows(file.path, keys, targets, sizes, manifest is not None)


def _sizes(
    tokenizer: V2FlowTokenizer, path: Path, rows: np.ndarray, manifest: TokenManifest | None
) -> list[tuple[int, int]]:
    """Height and width in pixels of the image of each row.

    Raises: ValueError for a number of tokens that does not fit; TokenFileError if the sizes of images that keep their
            shapes are missing.
    """
    if manifest is None or not manifest.keep_aspect:
        size = tokenizer.grid_of(rows.shape[1]) if manifest is None else manifest.image_size
        tokenizer.check_length(rows.shape[1], *size)
        return [size] * len(rows)
    sizes = load_sizes(path)
    if len(sizes) != len(rows):
        raise TokenFileError(f"{path}: {len(rows)} rows, but {len(sizes)} sizes. Encode it again.")
    for row, size in zip(rows, sizes):
        tokenizer.check_length(len(row_of(row, tokenizer.config.codebook_size)), *size)
    return sizes


def decode_files(
    tokenizer: V2FlowTokenizer,
    opened: Sequence[TokenRows],
    report: DecodeReport,
    *,
    seed: int,
    batch_size: int | None = None,
    dtype: torch.dtype,
    tick: Callable[[int], None],
    **sampling: Any,
) -> None:
    """Write the PNG of every row and list it in ``report``; an image does not depend on its batch.

    Threads, one per core, write the files while the next batch is decoded.

    Args:   batch_size, images (default: by the device); sampling, as V2FlowTokenizer.decode takes it.
    """
    sides = (side for rows in opened for size in rows.sizes for side in size)
    size = max(sides, default=tokenizer.config.image_size)
    batch_size = batch_size or pick_batch_size(tokenizer.device, size)
    images = _decode_batches(tokenizer, opened, seed, batch_size, dtype, sampling)
    workers = cpu_cores()
    for target in map_ahead(_write_png, images, workers, batch_size + workers):
        report.images.append(target)
        tick(1)


def _decode_batches(
    tokenizer: V2FlowTokenizer,
    opened: Sequence[TokenRows],
    seed: int,
    batch_size: int,
    dtype: torch.dtype,
    sampling: Mapping[str, Any],
) -> Iterator[tuple[Image.Image, Path]]:
    """The image of every row, and the path of its PNG."""
    device = tokenizer.device
    for batch, (height, width) in _batches(opened, tokenizer, batch_size):
        rows = [torch.from_numpy(row_of(ids, tokenizer.config.codebook_size)) for ids, _, _ in batch]
        token_ids = pad_sequence(rows, batch_first=True).to(device)  # (B, L), padded after ``lengths``
        lengths = [len(row) for row in rows]
        seeds = [image_seed(seed, key) for _, key, _ in batch]
        with inference(device, dtype):
            images = tokenizer.decode(token_ids, lengths=lengths, height=height, width=width, seeds=seeds, **sampling)
        yield from zip(to_pil(images), (target for _, _, target in batch))


def _write_png(item: tuple[Image.Image, Path]) -> Path:
    image, target = item
    write_bytes(target, png_bytes(image))
    return target


def _batches(
    opened: Sequence[TokenRows], tokenizer: V2FlowTokenizer, batch_size: int
) -> Iterator[tuple[list[tuple[np.ndarray, str, Path]], tuple[int, int]]]:
    """Rows of equal image size in groups of at most ``batch_size``, with that size."""
    waiting: dict[tuple[int, int], list[tuple[np.ndarray, str, Path]]] = {}
    for rows in opened:
        codes = tokenizer.config.codebook_size
        ids = np.atleast_2d(load_token_ids(rows.path, codes, variable_length=True))  # one file open at a time
        for size, *row in zip(rows.sizes, ids, rows.keys, rows.targets):
            batch = waiting.setdefault(size, [])
            batch.append((row[0], row[1], row[2]))
            if len(batch) == batch_size:
                yield batch, size
                waiting[size] = []
    for size, batch in waiting.items():
        if batch:
            yield batch, size
