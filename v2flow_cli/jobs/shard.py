"""Writes WebDataset tars: the work of ``v2flow shard``.

The same images and captions give the same bytes, for any number of workers and interruptions: members carry no time,
user or group. ``shard_sources.py`` lists the images.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from webdataset import TarWriter

from v2flow_cli.errors import DataError
from v2flow_cli.jobs.shard_sources import Source
from v2flow_cli.jobs.shard_staging import ShardReport, StagedSet, check_folder, check_free, shards_of_prefix
from v2flow_cli.store.files import map_ahead, remove_partials, replacing, sha256_of, write_bytes
from v2flow_cli.store.images import image_bytes, open_image, png_bytes
from v2flow_cli.store.names import safe_key
from v2flow_cli.store.paths import check_apart
from v2flow_cli.store.shard_index import (
    Member,
    SampleIndex,
    ShardInfo,
    digest_of,
    index_lines,
    index_path,
    read_member,
)
from v2flow_cli.store.shards import index_shard

_BATCH_AHEAD = 4  # images waiting per worker


def write_shards(
    sources: Iterable[Source],
    out: Path,
    *,
    prefix: str,
    shard_bytes: int,
    short_side: int | None = None,
    workers: int = 2,
    force: bool = False,
    report: ShardReport | None = None,
    tick: Callable[[int], None] = lambda advance: None,
) -> ShardReport:
    """Write ``PREFIX-000000.tar``, ... of at most about ``shard_bytes``, an index each, and ``manifest.json``.

    They are written to a hidden folder, and replace an older set when the last one is complete. JPEG, PNG and WebP
    files are stored unchanged, others as PNG; with ``short_side`` (pixels), images with a longer shorter side are
    reduced and stored as JPEG. A repeated run continues after the last complete shard of a stopped run.
    Returns: a report that lists bad images as failures; if all are bad, nothing is written or replaced.
    Raises:  DataError if ``out`` holds shards (unless ``force``), cannot be written, holds a stopped run of other
             images or options, the manifest of something else, or the input images.
    """
    report = report or ShardReport()
    staged = StagedSet(out, prefix, {"shard_bytes": shard_bytes, "short_side": short_side})
    samples = _Samples(sources, out, short_side, workers, report, tick)
    check_folder(out, prefix)
    staged.finish_moving()
    if staged.exists and not force:
        count, digest = staged.resume(report)
        if count:
            num_failures = len(report.failures)
            if samples.skip(count, {failure.name for failure in report.failures}) != digest:
                raise staged.other_images()
            del report.failures[num_failures:]  # those of the listing, which are in the report already
    elif not force:
        check_free(out, shards_of_prefix(out, prefix))
    stream = iter(samples)
    sample = next(stream, None)
    if sample is None and not report.shards:
        return report
    if not report.shards:
        staged.begin()
    remove_partials(out)
    with contextlib.closing(stream):  # type: ignore[type-var]  # a generator
        while sample is not None:
            path, first = staged.folder / f"{prefix}-{len(report.shards):06d}.tar", sample
            size = captions = captioned = 0
            with replacing(path) as file, _tar_writer(file) as tar:
                while sample is not None and (sample is first or size + sample.tar_bytes <= shard_bytes):
                    size += sample.tar_bytes
                    captions += sample.captions
                    captioned += sample.captions > 0
                    tar.write(sample.members)
                    last, sample = sample, next(stream, None)
            report.shards.append(_finish(path))
            report.captions += captions
            report.captioned += captioned
            staged.add(report, last.ordinal + 1, last.digest, last.failures)
    report.failures[:] = dict.fromkeys(report.failures)  # a resumed listing repeats some
    staged.publish(report)
    return report


def _tar_writer(file: Any) -> TarWriter:
    plain = {"encoder": False, "compress": False, "format": "GNU_FORMAT"}
    return TarWriter(file, user="", group="", mode=0o644, mtime=0, **plain)


def _finish(path: Path) -> ShardInfo:
    """Read a written shard back, write its index, and return its entry for the manifest."""
    samples = []
    with open(path, "rb") as file:
        for sample in index_shard(path).samples:
            digests = {e: digest_of(read_member(file, m)) for e, m in sample.members.items()}
            members = {e: Member(m.offset, m.size, digests[e]) for e, m in sample.members.items()}
            samples.append(SampleIndex(sample.key, members))
    lines = index_lines(samples)
    write_bytes(index_path(path), lines)
    index_sha256 = hashlib.sha256(lines).hexdigest()
    return ShardInfo(path.name, len(samples), path.stat().st_size, sha256_of(path), index_sha256)


@dataclass(frozen=True)
class _Sample:
    """A WebDataset sample to write.  ordinal: of its source; digest: of all sources up to it."""

    members: dict[str, Any]
    captions: int
    ordinal: int
    digest: str
    failures: int  # listed before it

    @property
    def tar_bytes(self) -> int:
        """A header block per member (three for a long name), and data in blocks of 512 bytes."""
        key, total = self.members["__key__"], 0
        for name, content in self.members.items():
            if name != "__key__":
                header = 512 if len(f"{key}.{name}".encode()) <= 100 else 1536
                total += header + -(-len(content) // 512) * 512
        return total


class _Samples:
    """The good images as samples, in order, with safe keys; ``skip`` skips those of an earlier run."""

    def __init__(
        self,
        sources: Iterable[Source],
        out: Path,
        short_side: int | None,
        workers: int,
        report: ShardReport,
        tick: Callable[[int], None],
    ) -> None:
        self.sources, self.short_side, self.workers = enumerate(sources), short_side, workers
        self.out = out
        self.report, self.tick = report, tick
        self.taken: set[str] = set()
        self.folder: Path | None = None  # of the last image
        self.digest = hashlib.sha256()

    def skip(self, count: int, left_out: set[str]) -> str:
        """Skip ``count`` sources, of which those named in ``left_out`` have no key; returns their digest."""
        for _, source in itertools.islice(self.sources, count):
            self._check_source(source)
            self.tick(1)
            if source.name not in left_out:
                self._key(source)
        return self.digest.hexdigest()

    def __iter__(self) -> Iterator[_Sample]:
        ahead = _BATCH_AHEAD * self.workers
        for (ordinal, source), loaded in map_ahead(self._load, self.sources, self.workers, ahead):
            self.tick(1)
            self._check_source(source)
            if isinstance(loaded, DataError):
                self.report.failures.append(source.failed(loaded))
                continue
            extension, content, captions = loaded
            members: dict[str, Any] = {"__key__": self._key(source), extension: content}
            if captions:
                members["txt"] = "\n".join(captions).encode()
            yield _Sample(members, len(captions), ordinal, self.digest.hexdigest(), len(self.report.failures))

    def _check_source(self, source: Source) -> None:
        if source.image.path.parent != self.folder:  # once for each folder, not for each image
            self.folder = source.image.path.parent
            check_apart(self.out, [self.folder])
        self.digest.update(source.identity.encode())

    def _key(self, source: Source) -> str:
        # Keys from a tar are unique in it and contain its name, so they need not be stored.
        return safe_key(source.image.key, self.taken if source.member is None else None)

    def _load(
        self, item: tuple[int, Source]
    ) -> tuple[tuple[int, Source], tuple[str, bytes, tuple[str, ...]] | DataError]:
        try:
            content, captions = item[1].read()
            return item, (*_stored_form(content, item[1].name, self.short_side), captions)
        except DataError as error:
            return item, error


def _stored_form(content: bytes, name: str, short_side: int | None) -> tuple[str, bytes]:
    """Extension and bytes to store; the image is decoded completely.  Raises: DataError for a bad image."""
    image = open_image(content, name)
    if short_side is not None and min(image.size) > short_side:
        scale = short_side / min(image.size)
        size = (max(short_side, round(image.width * scale)), max(short_side, round(image.height * scale)))
        reduced = image.resize(size, Image.Resampling.BICUBIC)
        return "jpg", image_bytes(reduced, "JPEG", quality=95, subsampling=0)
    if content.startswith(b"\xff\xd8"):
        return "jpg", content
    if content.startswith(b"\x89PNG"):
        return "png", content
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "webp", content
    return "png", png_bytes(image)
