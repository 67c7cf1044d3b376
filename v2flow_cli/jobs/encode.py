"""Sets of images to sets of tokens: the work of ``v2flow encode``.

Threads read and decode images a few batches ahead; only the ids of one shard are in memory. Of R processes number r
takes every R-th shard (or image), and the first one writes the manifest at the end: the output depends neither on R nor
on how often the run was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from v2flow_cli.errors import DataError, UnwritableName
from v2flow_cli.jobs.encode_resume import EncodeReport, begin_run, end_run
from v2flow_cli.jobs.prefixes import Prefixes, shortest_prefixes
from v2flow_cli.recipe.schema import MAX_ASPECT
from v2flow_cli.runtime.device import cpu_cores, inference, pick_batch_size
from v2flow_cli.runtime.processes import Processes
from v2flow_cli.store.captions import captions_beside, captions_of
from v2flow_cli.store.failures import Failure, load_failures, save_failures
from v2flow_cli.store.files import fingerprint, map_ahead
from v2flow_cli.store.find import InputFile
from v2flow_cli.store.images import open_image
from v2flow_cli.store.not_taken import NotTaken
from v2flow_cli.store.shard_index import read_member
from v2flow_cli.store.shards import ShardIndex, Verify, index_shard, open_shard
from v2flow_cli.store.token_file import load_samples, samples_path, save_samples, save_token_ids
from v2flow_cli.store.token_manifest import TokenManifest
from v2flow_cli.store.unfinished import Finished, Unfinished
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.other_decoders import FAITHFUL
from v2flow_cli.tokenizer.preprocess import image_to_tensor

Tick = Callable[[int], None]
ALONE = Processes()
WHOLE = Prefixes()


class Encoded(NamedTuple):
    """One image.  token_ids: (L,) int64; size: (height, width) of the encoded image in pixels."""

    key: str
    token_ids: np.ndarray
    size: tuple[int, int]


class ShardIds:
    """The keys, sizes and ids of a shard's images, the ids in one array.

    Separate arrays would be allocated between the buffers of a batch, megabytes each, and fragment the heap, which then
    grows by a buffer per batch.

    Args:   capacity, the most images; manifest, of the set.
    """

    def __init__(self, capacity: int, manifest: TokenManifest) -> None:
        self.keys: list[str] = []
        self.tokens = 0
        self.sizes: list[tuple[int, int]] = []  # (height, width) in pixels
        self._longest = 0
        codes = manifest.codebook_size  # as an id it is padding
        self._ids = np.full((capacity, manifest.tokens_per_image), codes, np.uint16 if codes < 65_536 else np.uint32)

    def append(self, image: Encoded) -> None:
        """Add an image's ids."""
        length = len(image.token_ids)
        self._ids[len(self.keys), :length] = image.token_ids
        self.keys.append(image.key)
        self.sizes.append(image.size)
        self.tokens += length
        self._longest = max(self._longest, length)

    @property
    def ids(self) -> np.ndarray:
        """The ids (N, L) of all images, shorter rows padded with the codebook's size."""
        return self._ids[: len(self.keys), : self._longest]


class SetEncoder:
    """Images to ids in batches; bad images become failures.

    Args:   image_size, side in pixels (default: the tokenizer's); keep_aspect, resize each image to about that side
            squared instead of cropping a square; batch_size, images (default: by the device); workers, threads that
            read and decode while the model computes (default: one per core); dtype, of the computation; prefixes, how
            many tokens of an image are kept; refine_steps, gradient steps after the encoder (default:
            the tokenizer's for a number of tokens).
    Raises: DataError for an image size or prefixes that the tokenizer does not have.
    """

    def __init__(
        self,
        tokenizer: V2FlowTokenizer,
        *,
        image_size: int | None = None,
        batch_size: int | None = None,
        workers: int | None = None,
        dtype: torch.dtype = torch.float32,
        prefixes: Prefixes = WHOLE,
        keep_aspect: bool = False,
        refine_steps: int | None = None,
    ) -> None:
        self.keep_aspect = keep_aspect
        self.refine_steps = tokenizer.steps_to_refine(prefixes.tokens, refine_steps)
        self.prefixes, self.short = prefixes, 0
        self.tokenizer, self.dtype = tokenizer, dtype
        self.image_size = image_size or tokenizer.config.image_size
        self.batch_size = batch_size or pick_batch_size(tokenizer.device, self.image_size)
        self.workers = workers or cpu_cores()
        try:
            side = self.image_size
            longest = (
                _longest_of_any_shape(tokenizer, side, prefixes)
                if keep_aspect
                else prefixes.longest(tokenizer, side, side)
            )
        except ValueError as error:
            raise DataError(f"--res {self.image_size}: {error}") from error
        self.empty_manifest = TokenManifest(
            tokenizer.token_digest,
            (self.image_size, self.image_size),
            tokenizer.config.codebook_size,
            longest,
            variable_length=keep_aspect or prefixes.min_psnr_db is not None,
            min_psnr_db=prefixes.min_psnr_db,
            keep_aspect=keep_aspect,
            refine_steps=self.refine_steps,
            refined_by=tokenizer.with_decoder(FAITHFUL).digest if self.refine_steps else "",
        )

    def encode(
        self, items: Iterable[tuple[str, str, Path | bytes | DataError]], failures: list[Failure], tick: Tick
    ) -> Iterator[Encoded]:
        """The ids of each good (key, source, image) in order; bad ones are added to ``failures``.

        Args:   items, images as files, as bytes from the tar ``source``, or the error from reading them.
        """
        batch: list[tuple[str, Tensor]] = []
        ahead = 2 * self.batch_size + self.workers
        for key, pixels in map_ahead(self._load, items, self.workers, ahead):
            if isinstance(pixels, Failure):
                failures.append(pixels)
                tick(1)
                continue
            batch.append((key, pixels))
            if len(batch) == self.batch_size:
                yield from self._encode_batch(batch, tick)
                batch = []
        if batch:
            yield from self._encode_batch(batch, tick)

    def _load(self, item: tuple[str, str, Path | bytes | DataError]) -> tuple[str, Tensor | Failure]:
        key, source, content = item
        name = source if isinstance(content, Path) else f"{source}/{key}"
        try:
            if isinstance(content, DataError):
                raise content
            image = open_image(content, name)
        except DataError as error:
            return key, Failure.of(error, source, None if isinstance(content, Path) else key)
        if self.keep_aspect:
            return key, image_to_tensor(image, self.tokenizer.fitted_size(*image.size, self.image_size))
        return key, image_to_tensor(image, self.image_size)

    def _encode_batch(self, batch: list[tuple[str, Tensor]], tick: Tick) -> Iterator[Encoded]:
        """The images in the order of ``batch``; those of one size are encoded together."""
        indices: dict[tuple[int, int], list[int]] = {}
        for i, (_, pixels) in enumerate(batch):
            indices.setdefault((pixels.shape[1], pixels.shape[2]), []).append(i)
        encoded: dict[int, Encoded] = {}
        for size, rows in indices.items():
            encoded.update(zip(rows, self._encode_size([batch[i] for i in rows], size)))
        tick(len(batch))
        yield from (encoded[i] for i in range(len(batch)))

    def _encode_size(self, batch: list[tuple[str, Tensor]], size: tuple[int, int]) -> Iterator[Encoded]:
        device = self.tokenizer.device
        images = torch.stack([pixels for _, pixels in batch]).to(device)  # (B, 3, H, W)
        with inference(device, self.dtype):
            token_ids = self.tokenizer.encode(images, self.prefixes.tokens, self.refine_steps)  # (B, L)
            lengths: list[int | None] = [None] * len(batch)
            if self.prefixes.min_psnr_db is not None:
                keys = [key for key, _ in batch]
                lengths = shortest_prefixes(self.tokenizer, images, token_ids, keys, self.prefixes.min_psnr_db)
                self.short += lengths.count(None)
        for (key, _), ids, length in zip(batch, token_ids.cpu().numpy(), lengths):
            yield Encoded(key, ids[:length], size)


def _longest_of_any_shape(tokenizer: V2FlowTokenizer, side: int, prefixes: Prefixes) -> int:
    """The most tokens of an image that keeps its shape.

    Raises:  DataError for a number of tokens that only some shapes have; ValueError for a side that does not fit.
    """
    if prefixes.tokens is not None and not tokenizer.flexible:
        raise DataError(
            f"--aspect keep and --tokens {prefixes.tokens}: the shape of an image determines its number of tokens. "
            "Leave --tokens out; prefixes need a tokenizer of flexible length."
        )
    shapes = {tokenizer.fitted_size(wide, 1000, side) for wide in range(1000, round(1000 * MAX_ASPECT) + 1, 10)}
    return max(prefixes.longest(tokenizer, *shape) for shape in shapes)


def encode_files(
    encoder: SetEncoder,
    images: Sequence[InputFile],
    out: Path,
    *,
    force: bool,
    tick: Tick,
    ranks: Processes = ALONE,
    not_taken: NotTaken | None = None,
) -> EncodeReport:
    """Write one ``.npy`` (L,) per image, in the input's folder tree under ``out``, and the manifest.

    Captions in the ``.txt`` beside an image are written beside its tokens. Tokens of a stopped run of the same
    tokenizer and size are kept, unless ``force``.
    Args:   not_taken, other files of the inputs, for the report.
    Raises: DataError for an output that exists, and for finished tokens of other images of the same names;
            TokenFileError if ``out`` holds other tokens (all unless ``force``). Bad images are in the report's
            failures.
    """
    inputs = {image.key: image.path for image in images}
    report, kept = begin_run(encoder.empty_manifest, inputs, out, force, ranks, not_taken, tars=False)
    rank_images = images[ranks.rank :: ranks.count]
    todo = [image for image in rank_images if image.key not in kept]
    report.kept_files = len(rank_images) - len(todo)
    tick(report.kept_files)
    journal = Unfinished(out)
    items = ((image.key, str(image.path), image.path) for image in todo)
    for key, token_ids, size in encoder.encode(items, report.failures, tick):
        try:
            captions = captions_beside(inputs[key], report.not_taken)
        except DataError as error:
            report.failures.append(Failure(str(inputs[key]), f"its captions: {error}"))
            continue
        try:
            _save_captions(out / f"{key}.npy", key, captions, size if encoder.keep_aspect else None)
            save_token_ids(out / f"{key}.npy", token_ids, report.manifest.codebook_size)
        except UnwritableName as error:
            report.failures.append(Failure(str(inputs[key]), str(error)))
            continue
        journal.add(ranks.rank, key, Finished(1, fingerprint(inputs[key])))
        report.images += 1
        report.captioned += bool(captions)
        report.tokens += len(token_ids)
    report.files, report.short = report.images, encoder.short
    return end_run(report, inputs, out, ranks, tars=False)


def _save_captions(target: Path, key: str, captions: Sequence[str], size: tuple[int, int] | None) -> None:
    """Written before the ids, so that ids are never without captions. A square image without captions has no file."""
    if captions or size:
        save_samples(target, [(key, captions)], [size] if size else None)
    else:
        samples_path(target).unlink(missing_ok=True)  # of an earlier version of the image


def encode_shards(
    encoder: SetEncoder,
    shards: Sequence[InputFile],
    out: Path,
    *,
    force: bool,
    tick: Tick,
    verify: Verify = "quick",
    ranks: Processes = ALONE,
    max_minutes: float = 0.0,
    not_taken: NotTaken | None = None,
) -> EncodeReport:
    """Write one ``.npy`` (N, L) per shard with keys and captions beside it, and the manifest.

    Tokens that an earlier run of the same tokenizer and size finished are kept, unless ``force``. The bad samples of a
    shard are listed in ``NAME.bad.jsonl`` beside its tokens. After ``max_minutes`` a process begins no further shard;
    the manifest then lists the finished ones, and a second run continues.
    Args:   not_taken, other files of the inputs, for the report.
    Raises: DataError for an output that exists and is not of such a run, for shards that have changed since, and for
            fewer shards than ranks; TokenFileError if ``out`` holds other tokens. Bad images and damaged shards are in
            the report's failures.
    """
    if len(shards) < ranks.count:
        raise DataError(
            f"{len(shards)} tars for {ranks.count} processes: some would have nothing to do. Launch at most "
            f"{len(shards)}, or write smaller tars with `v2flow shard --shard-mb`."
        )
    inputs = {shard.key: shard.path for shard in shards}
    report, kept = begin_run(encoder.empty_manifest, inputs, out, force, ranks, not_taken, tars=True)
    journal = Unfinished(out)
    start = time.monotonic()
    for shard in shards[ranks.rank :: ranks.count]:
        target = out / f"{shard.key}.npy"
        if shard.key in kept:
            index, samples = index_shard(shard.path, verify), load_samples(target) or []
            if not index.failures and not {key for key, _ in samples} <= {sample.key for sample in index.samples}:
                raise DataError(f"{shard.path}: holds other keys than {target}. Use --force to encode it again.")
            report.not_taken.merge(index.not_taken)
            report.failures += load_failures(_bad_path(target))
            report.kept_files += 1
            tick(len(samples))
            continue
        if max_minutes and report.images and time.monotonic() - start > 60 * max_minutes:
            report.later += 1
            continue
        try:
            rows = _encode_shard(encoder, shard, target, verify, tick, report)
        except UnwritableName as error:
            report.failures.append(Failure(str(shard.path), str(error), samples=None))
            continue
        if rows:
            journal.add(ranks.rank, shard.key, Finished(rows, fingerprint(shard.path)))
    report.short = encoder.short
    return end_run(report, inputs, out, ranks, tars=True)


def _bad_path(target: Path) -> Path:
    return target.with_name(f"{target.stem}.bad.jsonl")


def _encode_shard(
    encoder: SetEncoder, shard: InputFile, target: Path, verify: Verify, tick: Tick, report: EncodeReport
) -> int:
    """Write a shard's tokens, keys and bad samples, and count them in ``report``; the number of good samples."""
    captions: dict[str, tuple[str, ...]] = {}
    try:
        index = index_shard(shard.path, verify)
        failures = list(index.failures)
        items = _images_of(shard.path, index, captions)
        rows = ShardIds(len(index.samples), encoder.empty_manifest)
        for image in encoder.encode(items, failures, tick):
            rows.append(image)
        report.not_taken.merge(index.not_taken)
        if not rows.keys and not failures:
            failures = [Failure(str(shard.path), "no image in it", samples=0)]
    except DataError as error:
        rows = ShardIds(0, encoder.empty_manifest)
        failures = [Failure.of(error, shard.path, samples=None)]
    if failures:
        save_failures(_bad_path(target), failures)
    elif _bad_path(target).exists():
        _bad_path(target).unlink()
    if rows.keys:  # the ids last, so that they are never without the rest
        sizes = rows.sizes if encoder.keep_aspect else None
        save_samples(target, [(key, captions[key]) for key in rows.keys], sizes)
        save_token_ids(target, rows.ids, encoder.empty_manifest.codebook_size)
    report.failures += failures
    report.images += len(rows.keys)
    report.captioned += sum(bool(captions[key]) for key in rows.keys)
    report.tokens += rows.tokens
    report.files += bool(rows.keys)
    return len(rows.keys)


def _images_of(
    path: Path, index: ShardIndex, captions: dict[str, tuple[str, ...]]
) -> Iterator[tuple[str, str, bytes | DataError]]:
    """(key, shard, image bytes or the error from reading them) of each sample; adds its captions to ``captions``."""
    samples = [sample for sample in index.samples if sample.image is not None]
    if not samples:
        return
    with open_shard(path) as file:
        for sample in samples:
            assert sample.image is not None
            try:
                captions[sample.key] = captions_of(file, sample, index.not_taken)
                yield sample.key, str(path), read_member(file, sample.members[sample.image])
            except DataError as error:
                yield sample.key, str(path), error
