"""Reads WebDataset tars: any sample by one seek, and every lost sample is reported.

A shard in a manifest is read by its index, with every member checked against its digest; any other tar by its headers.
``jobs/shard.py`` writes shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from v2flow_cli.errors import DataError
from v2flow_cli.store.captions import captions_of
from v2flow_cli.store.failures import Failure
from v2flow_cli.store.files import sha256_of
from v2flow_cli.store.gzipped import open_plain
from v2flow_cli.store.images import SUFFIXES
from v2flow_cli.store.names import safe_key, suffix_of
from v2flow_cli.store.not_taken import NotTaken
from v2flow_cli.store.shard_index import Member, SampleIndex, ShardInfo, load_index, load_manifest, read_member
from v2flow_cli.store.tar_scan import scan_tar

# quick: sizes, counts and the digests of members that are read; full: every shard's SHA-256 first
Verify = Literal["quick", "full"]


@dataclass(frozen=True)
class ShardIndex:
    """The intact samples of a shard, the lost ones, and the members that belong to no sample."""

    samples: list[SampleIndex]
    failures: list[Failure]
    not_taken: NotTaken = field(default_factory=NotTaken)


def index_shard(path: str | Path, verify: Verify = "quick") -> ShardIndex:
    """The samples of a tar, gzipped or not, with safe keys, and its lost samples.

    The key is the name up to the first dot of its last part, as in WebDataset; members of one key need not be adjacent.
    A sample has one image: further images, hidden members and special files are not used.
    Raises: DataError for a tar without manifest that is missing, or is not a tar from its first byte.
    """
    path = Path(path)
    info = load_manifest(path.parent).get(path.name)
    samples = load_index(path, info) if info else None
    index = (
        _by_headers(path, info, verify) if info is None or samples is None else _by_index(path, info, samples, verify)
    )
    taken: set[str] = set()
    samples = [SampleIndex(safe_key(s.key, taken), s.members) for s in index.samples]
    return ShardIndex(samples, [*index.failures, *_further_images(path, samples, index.not_taken)], index.not_taken)


def _further_images(path: Path, samples: Iterable[SampleIndex], not_taken: NotTaken) -> Iterator[Failure]:
    """Failures for the further images of a sample.

    Beside a plain ``KEY.jpg`` they are masks and the like, which are only counted. If all have text between key and
    suffix (``22.05.jpg``, ``22.06.jpg``), they are probably separate images whose names have dots: those are lost.
    """
    for sample in samples:
        images = sample.images
        if not images:
            suffixes = ", ".join(f".{extension}" for extension in sorted(sample.members))
            not_taken.add(f"{path}/{sample.key}", f"samples of only {suffixes}", "no image in them")
        for extension in images[1:]:
            if "." in images[0]:
                reason = (
                    f"{sample.key}.{extension} has the key of {sample.key}.{images[0]}, which is used: a key ends at "
                    "the first dot. Rename it, or pack the files with `v2flow shard`"
                )
                yield Failure(str(path), reason, sample.key)
            else:
                kind = f".{extension.lower()} members"
                not_taken.add(f"{path}/{sample.key}.{extension}", kind, "their samples have another image")


def _by_index(path: Path, info: ShardInfo, samples: list[SampleIndex], verify: Verify) -> ShardIndex:
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        return ShardIndex([], [Failure(str(path), "the shard is missing", s.key) for s in samples])
    intact = [sample for sample in samples if sample.end <= size]
    cut = f"truncated: the shard has {size:,} of {info.bytes:,} bytes"
    failures = [Failure(str(path), cut, sample.key) for sample in samples if sample.end > size]
    damaged = size != info.bytes
    try:
        same = verify != "full" or sha256_of(path) == info.sha256
    except OSError as error:
        return ShardIndex([], [Failure(str(path), f"cannot be read ({error.strerror})", s.key) for s in samples])
    if not same:
        damaged, checked = True, []
        with open_shard(path) as file:
            for sample in intact:
                try:
                    for member in sample.members.values():
                        read_member(file, member)
                    checked.append(sample)
                except DataError as error:
                    failures.append(Failure.of(error, path, sample.key))
        intact = checked
    if damaged and not failures:
        reason = f"{size:,} bytes that differ from its manifest's {info.bytes:,}, but every sample in it is intact"
        failures = [Failure(str(path), reason, samples=0)]
    return ShardIndex(intact, failures)


def _by_headers(path: Path, info: ShardInfo | None, verify: Verify) -> ShardIndex:
    try:
        scan = scan_tar(path)
    except DataError as error:
        if info is None:
            raise
        return ShardIndex([], [Failure.of(error, path, samples=info.samples)])
    not_taken = NotTaken()
    samples, failures, scattered = _group(path, scan.members, not_taken)
    for name, reason in scan.left_out:
        if suffix_of(name, SUFFIXES):
            not_taken.add(f"{path}/{name}", "non-file members", reason)
    if scan.damaged_at is not None:
        # Without an index the last sample before the damage may be incomplete, so it is lost too. If members of a
        # sample are not adjacent, that holds for every sample.
        cut = f"damaged or truncated at byte {scan.damaged_at:,}"
        intact = [] if scattered else samples[:-1]
        failures += [Failure(str(path), f"{cut}: it may be incomplete", s.key) for s in samples[len(intact) :]]
        if info is None:
            failures.append(Failure(str(path), f"{cut}: an unknown number of samples followed", samples=None))
        samples = intact
    if info is not None:
        count = sum(sample.image is not None for sample in samples)
        lost = info.samples - count - len(failures)
        if lost > 0:
            failures.append(
                Failure(str(path), f"{lost} more samples are lost; its index would name them", samples=lost)
            )
        elif verify == "full" and not failures and sha256_of(path) != info.sha256:
            reason = f"SHA-256 differs from its manifest; without its index any of {count} samples may be damaged"
            return ShardIndex([], [Failure(str(path), reason, samples=count)])
    return ShardIndex(samples, failures, not_taken)


def _group(
    path: Path, members: Iterable[tuple[str, int, int]], not_taken: NotTaken
) -> tuple[list[SampleIndex], list[Failure], bool]:
    """Samples in the order of their first members, failures, and whether samples are interleaved.

    Extensions are lower case, unless a sample has the same one in both cases.
    """
    samples: dict[str, dict[str, Member]] = {}
    repeated: dict[str, str] = {}
    failures: list[Failure] = []
    last, scattered = "", False
    for full_name, offset, size in members:
        folder, _, name = full_name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not stem and "." + extension.lower() in SUFFIXES:
            failures.append(Failure(str(path), f"the member {full_name!r} has an empty key", ""))
        if not stem or not dot:
            if name and "." + extension.lower() not in SUFFIXES:
                kind = "hidden members" if not stem else "members without a suffix"
                not_taken.add(f"{path}/{full_name}", kind, "they belong to no sample")
            continue
        key = f"{folder}/{stem}" if folder else stem
        scattered |= key in samples and key != last
        last = key
        if extension.lower() not in samples.setdefault(key, {}):
            extension = extension.lower()
        if extension in samples[key]:
            repeated[key] = f"holds {full_name} twice; write the shard again with unique keys"
        samples[key][extension] = Member(offset, size)
    failures += [Failure(str(path), reason, key) for key, reason in repeated.items()]
    return [SampleIndex(k, m) for k, m in samples.items() if k not in repeated], failures, scattered


def open_shard(path: str | Path) -> BinaryIO:
    """The shard, open for reading, unpacked if it is gzipped.  Raises: DataError if it cannot be opened."""
    try:
        return open_plain(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error


def iterate_shard(
    path: str | Path, failures: list[Failure] | None = None, not_taken: NotTaken | None = None
) -> Iterator[tuple[str, bytes, tuple[str, ...]]]:
    """(key, image bytes, captions) of each intact sample with an image, in order, one in memory at a time.

    Args:   failures, to which lost samples are added; not_taken, to which other members are added.
    Raises: DataError; without ``failures`` also, after the last good sample, one that names the first lost sample.
    """
    index = index_shard(path)
    lost = [] if failures is None else failures
    lost += index.failures
    if not_taken is not None:
        not_taken.merge(index.not_taken)
    if index.samples:
        with open_shard(path) as file:
            for sample in index.samples:
                if sample.image is None:
                    continue
                try:
                    content, captions = read_member(file, sample.members[sample.image]), captions_of(file, sample)
                except DataError as error:
                    lost.append(Failure.of(error, path, sample.key))
                    continue
                yield sample.key, content, captions
    if lost and failures is None:
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise DataError(f"{lost[0].name}: {lost[0].reason}{more}.")
