"""Sets of images to sets of tokens: what ``v2flow encode`` does, without the command line.

Images are read and decoded a few batches ahead in threads; the set is never in memory, a shard's ids are. Of R
processes number r takes every R-th shard (or image), and the first one writes the manifest when all are done: what is
written depends neither on R nor on how often the run was stopped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from v2flow_cli.errors import DataError, TokenFileError
from v2flow_cli.jobs.prefixes import Prefixes, shortest_prefixes
from v2flow_cli.runtime.device import cpu_cores, pick_batch_size
from v2flow_cli.runtime.processes import Processes
from v2flow_cli.store.failures import Failure, load_failures, save_failures
from v2flow_cli.store.files import check_absent, map_ahead, remove_partials, write_bytes
from v2flow_cli.store.images import FoundFile, open_image
from v2flow_cli.store.shard_index import SampleIndex
from v2flow_cli.store.shards import Verify, captions_of, index_shard, open_shard, read_member
from v2flow_cli.store.token_file import TokenManifest, load_samples, save_samples, save_token_ids
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.preprocess import image_to_tensor

Tick = Callable[[int], None]
ALONE = Processes()
WHOLE = Prefixes()
_UNFINISHED = ".unfinished"  # lies in a folder of tokens from the beginning of a run to its end


@dataclass
class EncodeReport:
    """What an encoding wrote, kept and left out."""

    manifest: TokenManifest
    images: int = 0  # encoded by this call
    files: int = 0  # token files written by this call
    kept_files: int = 0  # finished ones of an earlier call
    tokens: int = 0  # written by this call
    later: int = 0  # tars that a time limit left for another call
    short: int = 0  # images of this call whose every token does not reach the PSNR asked for
    good: int = 0  # images in all files of this set, earlier calls included
    failures: list[Failure] = field(default_factory=list)


class ShardIds:
    """The keys and ids of a shard's images, the ids in one array.

    Kept one by one they would lie between the buffers of a batch, megabytes each: every one takes the beginning of a
    block that the next batch's buffer then no longer fits into, and the heap grows by a buffer a batch.

    Args:   capacity, images at most; manifest, of the set.
    """

    def __init__(self, capacity: int, manifest: TokenManifest) -> None:
        self.keys: list[str] = []
        self.tokens = 0
        self._longest = 0
        codes = manifest.codebook_size  # as an id it ends a short row
        self._ids = np.full((capacity, manifest.tokens_per_image), codes, np.uint16 if codes < 65_536 else np.uint32)

    def append(self, key: str, token_ids: np.ndarray) -> None:
        """Take an image's ids (L,)."""
        self._ids[len(self.keys), : len(token_ids)] = token_ids
        self.keys.append(key)
        self.tokens += len(token_ids)
        self._longest = max(self._longest, len(token_ids))

    @property
    def ids(self) -> np.ndarray:
        """The ids (N, L) of all images, shorter rows filled with the codebook's size."""
        return self._ids[: len(self.keys), : self._longest]


class SetEncoder:
    """Images to ids in batches, the bad ones put aside.

    Args:   image_size, side in pixels (default: the tokenizer's); batch_size, images (default: by the device);
            workers, threads that read and decode while the model computes (default: one a core); dtype, what the
            tokenizer computes in; prefixes, how many tokens of an image are kept.
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
    ) -> None:
        self.prefixes, self.short = prefixes, 0
        self.tokenizer, self.dtype = tokenizer, dtype
        self.image_size = image_size or tokenizer.config.image_size
        self.batch_size = batch_size or pick_batch_size(tokenizer.device, self.image_size)
        self.workers = workers or cpu_cores()
        try:
            longest = prefixes.longest(tokenizer, self.image_size, self.image_size)
        except ValueError as error:
            raise DataError(f"--res {self.image_size}: {error}") from error
        self.empty_manifest = TokenManifest(
            tokenizer.token_digest,
            (self.image_size, self.image_size),
            tokenizer.config.codebook_size,
            longest,
            variable_length=prefixes.min_psnr_db is not None,
            min_psnr_db=prefixes.min_psnr_db,
        )

    def encode(
        self, items: Iterable[tuple[str, str, Path | bytes | DataError]], failures: list[Failure], tick: Tick
    ) -> Iterator[tuple[str, np.ndarray]]:
        """(key, ids (L,) int64) of each good (key, source, image) in order; bad ones go to ``failures``.

        Args:   items, images as files, as bytes from the tar ``source``, or the error that reading them gave.
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
            reason = str(error).removeprefix(f"{name}: ").removeprefix(f"{source}: ")
            return key, Failure(source, reason, None if isinstance(content, Path) else key)
        return key, image_to_tensor(image, self.image_size)

    def _encode_batch(self, batch: list[tuple[str, Tensor]], tick: Tick) -> Iterator[tuple[str, np.ndarray]]:
        device = self.tokenizer.device
        images = torch.stack([pixels for _, pixels in batch]).to(device)  # (B, 3, H, W)
        with (
            torch.inference_mode(),
            torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32),
        ):
            token_ids = self.tokenizer.encode(images, self.prefixes.tokens)  # (B, L)
            lengths: list[int | None] = [None] * len(batch)
            if self.prefixes.min_psnr_db is not None:
                keys = [key for key, _ in batch]
                lengths = shortest_prefixes(self.tokenizer, images, token_ids, keys, self.prefixes.min_psnr_db)
                self.short += lengths.count(None)
        tick(len(batch))
        for (key, _), ids, length in zip(batch, token_ids.cpu().numpy(), lengths):
            yield key, ids[:length]


def encode_files(
    encoder: SetEncoder, images: Sequence[FoundFile], out: Path, *, force: bool, tick: Tick, ranks: Processes = ALONE
) -> EncodeReport:
    """One ``.npy`` (L,) per image, the input's tree mirrored under ``out``, and the manifest.

    Images that a stopped run of the same tokenizer and size has finished are kept, unless ``force``.
    Raises: DataError for an output that exists; TokenFileError where ``out`` holds other tokens (both unless
            ``force``). Bad images end in the report's failures.
    """
    targets = {image.key: out / f"{image.key}.npy" for image in images}
    report, resumed = _begin(encoder, targets.values(), out, force, ranks, keep=False)
    mine = images[ranks.rank :: ranks.count]
    todo = mine if not resumed else [image for image in mine if not targets[image.key].exists()]
    report.kept_files = len(mine) - len(todo)
    tick(report.kept_files)
    for key, token_ids in encoder.encode(
        ((image.key, str(image.path), image.path) for image in todo), report.failures, tick
    ):
        save_token_ids(targets[key], token_ids, report.manifest.codebook_size)
        report.images += 1
        report.tokens += len(token_ids)
    report.files, report.short = report.images, encoder.short
    return _end(report, out, ranks, lambda: {key: 1 for key, target in targets.items() if target.exists()})


def encode_shards(
    encoder: SetEncoder,
    shards: Sequence[FoundFile],
    out: Path,
    *,
    force: bool,
    tick: Tick,
    verify: Verify = "quick",
    ranks: Processes = ALONE,
    max_minutes: float = 0.0,
) -> EncodeReport:
    """One ``.npy`` (N, L) per shard with keys and captions beside it, and the manifest.

    Shards that an earlier run of the same tokenizer and size finished are kept, unless ``force``. What was left out
    of a shard lies in ``NAME.bad.jsonl`` beside its tokens. With ``max_minutes`` a process begins no further
    shard after so long; the manifest then lists those that are done, and a second run goes on.
    Raises: DataError for an output that exists and is not of such a run, and for fewer shards than ranks;
            TokenFileError where ``out`` holds other tokens. Bad images and damaged shards end in the report's failures.
    """
    if len(shards) < ranks.count:
        raise DataError(
            f"{len(shards)} tars for {ranks.count} processes: some would have nothing to do. Launch at most "
            f"{len(shards)}, or write smaller tars with `v2flow shard --shard-mb`."
        )
    targets = {shard.key: out / f"{shard.key}.npy" for shard in shards}
    report, resumed = _begin(encoder, targets.values(), out, force, ranks, keep=True)
    start = time.monotonic()
    for shard in shards[ranks.rank :: ranks.count]:
        target = targets[shard.key]
        if not force and (resumed or shard.key in report.manifest.files) and target.exists():
            bad, count = _kept(shard, target, verify)
            report.kept_files += 1
            tick(count)
        elif max_minutes and report.images and time.monotonic() - start > 60 * max_minutes:
            report.later += 1
            continue
        else:
            bad, count, tokens = _encode_shard(encoder, shard, target, verify, tick)
            report.images += count
            report.tokens += tokens
            report.files += bool(count)
        report.failures += bad
    report.short = encoder.short
    return _end(report, out, ranks, lambda: {key: _rows(path) for key, path in targets.items() if path.exists()})


def _begin(
    encoder: SetEncoder, targets: Iterable[Path], out: Path, force: bool, ranks: Processes, keep: bool
) -> tuple[EncodeReport, bool]:
    """A report with the manifest in ``out``, and whether a stopped run of the same tokens is continued.

    Args:   keep, True where targets may also lie there from a run that was finished.
    """
    existing = _manifest_of(out, encoder, force)
    resumed = existing is not None and (out / _UNFINISHED).exists() and not force
    if not resumed and (existing is None or not keep):
        check_absent(targets, force)
    ranks.wait()  # every rank has seen the folder as it was
    report = EncodeReport(encoder.empty_manifest if existing is None else existing)
    if ranks.rank == 0:
        report.manifest.save(out)  # from here on a re-run knows the files as its own
        write_bytes(out / _UNFINISHED, b"")
        remove_partials(out)
    ranks.wait()
    return report, resumed


def _end(report: EncodeReport, out: Path, ranks: Processes, written: Callable[[], dict[str, int]]) -> EncodeReport:
    """Add the ranks' reports up; the first one writes the manifest of ``written`` and what lay there before."""
    said = out / f".{ranks.rank}.failures.jsonl"
    if ranks.rank:
        save_failures(said, report.failures)
    counts = [report.images, report.files, report.kept_files, report.tokens, report.short, report.later]
    report.images, report.files, report.kept_files, report.tokens, report.short, report.later = ranks.sum(counts)
    if ranks.rank == 0:
        for rank in range(1, ranks.count):
            said = out / f".{rank}.failures.jsonl"
            report.failures += load_failures(said)
            said.unlink()
        report.failures.sort(key=lambda failure: (failure.source, failure.key or ""))
        files = written()
        report.good = sum(files.values())
        report.manifest = dataclasses.replace(
            report.manifest, files=dict(sorted({**report.manifest.files, **files}.items()))
        )
        report.manifest.save(out)
        (out / _UNFINISHED).unlink()
    ranks.wait()
    return report


def _rows(target: Path) -> int:
    """Images in a shard's token file.  Raises: TokenFileError where its keys are missing."""
    samples = load_samples(target)
    if samples is None:
        raise TokenFileError(f"{target}: no keys beside it. Remove it and encode again, or use --force.")
    return len(samples)


def _kept(shard: FoundFile, target: Path, verify: Verify) -> tuple[list[Failure], int]:
    """What the run that finished ``shard`` left out, and how many images it has.

    Raises: DataError if the shard holds other samples since.
    """
    done = {key for key, _ in load_samples(target) or ()}
    index = index_shard(shard.path, verify)
    if not index.failures and not done <= {sample.key for sample in index.samples}:
        raise DataError(f"{shard.path}: holds other keys than {target}. Use --force to encode it again.")
    return load_failures(_bad_path(target)), len(done)


def _bad_path(target: Path) -> Path:
    return target.with_name(f"{target.stem}.bad.jsonl")


def _encode_shard(
    encoder: SetEncoder, shard: FoundFile, target: Path, verify: Verify, tick: Tick
) -> tuple[list[Failure], int, int]:
    """Write a shard's tokens, keys and bad samples; returns the latter, the number of good ones, and of tokens."""
    captions: dict[str, tuple[str, ...]] = {}
    try:
        index = index_shard(shard.path, verify)
        failures = list(index.failures)
        items = _images_of(shard.path, [sample for sample in index.samples if sample.image is not None], captions)
        rows = ShardIds(len(index.samples), encoder.empty_manifest)
        for key, ids in encoder.encode(items, failures, tick):
            rows.append(key, ids)
        if not rows.keys and not failures:
            failures = [Failure(str(shard.path), "no image in it", samples=0)]
    except DataError as error:
        rows = ShardIds(0, encoder.empty_manifest)
        failures = [Failure(str(shard.path), str(error).removeprefix(f"{shard.path}: "), samples=None)]
    if failures:
        save_failures(_bad_path(target), failures)
    elif _bad_path(target).exists():
        _bad_path(target).unlink()
    if rows.keys:  # the ids last: where they are, all is
        save_samples(target, [(key, captions[key]) for key in rows.keys])
        save_token_ids(target, rows.ids, encoder.empty_manifest.codebook_size)
    return failures, len(rows.keys), rows.tokens


def _images_of(
    path: Path, samples: Sequence[SampleIndex], captions: dict[str, tuple[str, ...]]
) -> Iterator[tuple[str, str, bytes | DataError]]:
    """(key, shard, image bytes or what reading them gave) of each sample; its captions go to ``captions``."""
    if not samples:
        return
    with open_shard(path) as file:
        for sample in samples:
            assert sample.image is not None  # the caller keeps no other
            try:
                captions[sample.key] = captions_of(file, sample)
                yield sample.key, str(path), read_member(file, sample.members[sample.image])
            except DataError as error:
                yield sample.key, str(path), error


def _manifest_of(out: Path, encoder: SetEncoder, force: bool) -> TokenManifest | None:
    """The manifest in ``out`` if it is of the same tokens; None where there is none or it may go."""
    existing = TokenManifest.load(out)
    if existing is None or existing.same_tokens(encoder.empty_manifest):
        return existing
    if force:
        return None
    raise TokenFileError(
        f"{out}: holds tokens of tokenizer {existing.tokenizer_digest} at {existing.image_size[0]} px; "
        f"these are of {encoder.tokenizer.token_digest} at {encoder.image_size} px. Use another -o, or --force."
    )
