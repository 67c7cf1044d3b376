"""Reading WebDataset tars: any sample is one seek and one read away, and nothing lost goes unsaid.

A shard that its manifest lists is read by the index beside it, every member checked against its digest; any other
by its headers. ``jobs/shard.py`` writes them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

from v2flow_cli.errors import DataError
from v2flow_cli.store.failures import Failure
from v2flow_cli.store.files import sha256_of
from v2flow_cli.store.images import SUFFIXES, FoundFile, expand_input, find_files
from v2flow_cli.store.shard_index import Member, SampleIndex, ShardInfo, digest_of, load_index, load_manifest
from v2flow_cli.store.tar_scan import scan_tar

_LONGEST_PART = 200  # bytes; file systems have room for 255, suffix included
_UNSAFE = re.compile(r'[\x00-\x1f\x7f\ud800-\udfff<>:"|?*.]')
_CAPTION_FIELDS = ("caption", "captions", "text", "prompt")  # of a .json member, in this order

Verify = Literal["quick", "full"]  # sizes, counts and the digest of what is read; or every byte's SHA-256 first


@dataclass(frozen=True)
class ShardIndex:
    """The whole samples of a shard, and what is known to be lost of it."""

    samples: list[SampleIndex]
    failures: list[Failure]


def find_shards(inputs: Sequence[str | Path]) -> list[Path]:
    """The tars among files, folders (searched recursively) and globs, each once, sorted within an input.

    Shards that a manifest in a folder lists are among them even where their files are gone.
    Raises: DataError for an input that does not exist or holds no ``.tar``.
    """
    shards: dict[Path, None] = {}
    for given in inputs:
        paths = expand_input(str(given))[1]
        tars = [p for p in paths if p.suffix.lower() == ".tar"]
        if not tars:
            raise DataError(f"{given}: no .tar in it. `v2flow shard` makes tars from a folder of images.")
        shards.update(dict.fromkeys(sorted(tars + missing_shards(Path(given), tars))))
    return list(shards)


def find_shard_files(inputs: Sequence[str | Path]) -> list[FoundFile]:
    """As ``find_shards``, with keys, sorted by them.  Raises: as ``find_files``."""
    files = find_files(inputs, {".tar"}, "tars")
    found = [file.path for file in files]
    for given in map(Path, inputs):
        for path in missing_shards(given, found):
            files.append(FoundFile(path, path.relative_to(given).with_suffix("").as_posix()))
    return sorted(files, key=lambda file: file.key)


def missing_shards(folder: Path, found: Iterable[Path]) -> list[Path]:
    """Shards that the manifests in and under ``folder`` list, but that are not among ``found``."""
    if not folder.is_dir():
        return []
    found = set(found)
    places = {folder, *(path.parent for path in found if folder in path.parents)}
    return sorted(place / name for place in places for name in load_manifest(place) if place / name not in found)


def index_shard(path: str | Path, verify: Verify = "quick") -> ShardIndex:
    """The samples of an uncompressed tar, with safe keys, and what was lost of it.

    The key is the name up to the first dot of its last part, as in WebDataset; members of one key need not be
    neighbours. Hidden members and whatever is not a regular file are left out.
    Raises: DataError for a tar without manifest that is missing, compressed, or no tar from its first byte.
    """
    path = Path(path)
    info = load_manifest(path.parent).get(path.name)
    samples = load_index(path, info) if info else None
    index = (
        _by_headers(path, info, verify) if info is None or samples is None else _by_index(path, info, samples, verify)
    )
    taken: set[str] = set()
    return ShardIndex([SampleIndex(safe_key(s.key, taken), s.members) for s in index.samples], index.failures)


def _by_index(path: Path, info: ShardInfo, samples: list[SampleIndex], verify: Verify) -> ShardIndex:
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        return ShardIndex([], [Failure(str(path), "the shard is missing", s.key) for s in samples])
    whole = [sample for sample in samples if sample.end <= size]
    cut = f"cut short: the shard has {size:,} of {info.bytes:,} bytes"
    failures = [Failure(str(path), cut, sample.key) for sample in samples if sample.end > size]
    damaged = size != info.bytes
    if verify == "full" and sha256_of(path) != info.sha256:
        damaged, checked = True, []
        with open_shard(path) as file:
            for sample in whole:
                try:
                    for member in sample.members.values():
                        read_member(file, member)
                    checked.append(sample)
                except DataError as error:
                    failures.append(Failure(str(path), str(error).removeprefix(f"{path}: "), sample.key))
        whole = checked
    if damaged and not failures:
        reason = f"{size:,} bytes that differ from its manifest's {info.bytes:,}, but every sample in it is whole"
        failures = [Failure(str(path), reason, samples=0)]
    return ShardIndex(whole, failures)


def _by_headers(path: Path, info: ShardInfo | None, verify: Verify) -> ShardIndex:
    try:
        scan = scan_tar(path)
    except DataError as error:
        if info is None:
            raise
        return ShardIndex([], [Failure(str(path), str(error).removeprefix(f"{path}: "), samples=info.samples)])
    samples, failures, scattered = _group(path, scan.members)
    if scan.damaged_at is not None:
        # Without an index nobody knows whether the last sample before the damage is whole: it goes too. Where
        # members of a sample are apart, that is so of every sample.
        cut = f"damaged or cut short at byte {scan.damaged_at:,}"
        kept = [] if scattered else samples[:-1]
        failures += [Failure(str(path), f"{cut}: it may be incomplete", s.key) for s in samples[len(kept) :]]
        if info is None:
            failures.append(Failure(str(path), f"{cut}: nobody knows how many samples followed", samples=None))
        samples = kept
    if info is not None:
        found = sum(sample.image is not None for sample in samples)
        if found + len(failures) < info.samples:
            lost = info.samples - found - len(failures)
            failures.append(
                Failure(str(path), f"{lost} more samples are lost; its index would name them", samples=lost)
            )
        elif verify == "full" and not failures and sha256_of(path) != info.sha256:
            reason = f"SHA-256 differs from its manifest; without its index any of {found} samples may be damaged"
            return ShardIndex([], [Failure(str(path), reason, samples=found)])
    return ShardIndex(samples, failures)


def _group(path: Path, members: Iterable[tuple[str, int, int]]) -> tuple[list[SampleIndex], list[Failure], bool]:
    """Samples by first member, members that no sample can be made of, and whether samples are interleaved."""
    samples: dict[str, dict[str, Member]] = {}
    repeated: dict[str, str] = {}
    failures: list[Failure] = []
    last, scattered = "", False
    for full_name, offset, size in members:
        folder, _, name = full_name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not stem and "." + extension.lower() in SUFFIXES:
            failures.append(Failure(str(path), f"the member {full_name!r} has an empty key", ""))
        if not stem or not dot or PurePosixPath(name).name.startswith("."):
            continue
        key = f"{folder}/{stem}" if folder else stem
        scattered |= key in samples and key != last
        last = key
        if extension in samples.setdefault(key, {}):
            repeated[key] = f"holds {full_name} twice; write the shard again with unique keys"
        samples[key][extension] = Member(offset, size)
    failures += [Failure(str(path), reason, key) for key, reason in repeated.items()]
    return [SampleIndex(k, m) for k, m in samples.items() if k not in repeated], failures, scattered


def open_shard(path: str | Path) -> BinaryIO:
    """The shard, open for reading.  Raises: DataError if it cannot be opened."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error


def read_member(file: BinaryIO, member: Member) -> bytes:
    """The bytes of a member of an open shard.  Raises: DataError if they end early or differ from their digest."""
    try:
        file.seek(member.offset)
        content = file.read(member.size)
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read at byte {member.offset:,} ({error.strerror}).") from error
    if len(content) != member.size:
        raise DataError(f"{file.name}: cut short at byte {member.offset + len(content):,}, inside a member.")
    if member.digest is not None and digest_of(content) != member.digest:
        raise DataError(f"{file.name}: damaged in bytes {member.offset:,} to {member.offset + member.size:,}.")
    return content


def read_captions(content: bytes) -> tuple[str, ...]:
    """One caption a line; blank lines are none, bytes that are not UTF-8 are replaced."""
    lines = content.decode("utf-8", errors="replace").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def captions_of(file: BinaryIO, sample: SampleIndex) -> tuple[str, ...]:
    """The captions in the sample's ``.txt`` member, else those in its ``.json``; none where it has neither."""
    if "txt" in sample.members:
        return read_captions(read_member(file, sample.members["txt"]))
    if "json" not in sample.members:
        return ()
    try:
        record = json.loads(read_member(file, sample.members["json"]))
    except (ValueError, RecursionError):  # bytes of another kind, not a caption
        return ()
    return captions_in(record)


def captions_in(record: Any) -> tuple[str, ...]:
    """The caption, or list of them, in a JSON record such as img2dataset and JourneyDB write."""
    if not isinstance(record, dict):
        return ()
    found = next((record[name] for name in _CAPTION_FIELDS if record.get(name)), ())
    texts = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    return tuple(" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip())


def iterate_shard(path: str | Path) -> Iterator[tuple[str, bytes, tuple[str, ...]]]:
    """(key, image bytes, captions) of each whole sample with an image, in order, one in memory at a time.

    Raises: DataError, after the last good one, that names the first of those that were lost.
    """
    index = index_shard(path)
    lost = list(index.failures)
    if index.samples:
        with open_shard(path) as file:
            for sample in index.samples:
                if sample.image is None:
                    continue
                try:
                    content, captions = read_member(file, sample.members[sample.image]), captions_of(file, sample)
                except DataError as error:
                    lost.append(Failure(str(path), str(error).removeprefix(f"{path}: "), sample.key))
                    continue
                yield sample.key, content, captions
    if lost:
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise DataError(f"{lost[0].name}: {lost[0].reason}{more}.")


def safe_key(key: str, taken: set[str] | None = None) -> str:
    """``key`` as a path that stays inside a folder on any system, without dots.

    Args:   taken, lower-case keys in use: a key that equals one of them but for case gets a number, and the
            result is added.
    """
    parts = [_UNSAFE.sub("_", part) for part in re.split(r"[/\\]", key) if part.strip(". ")]
    safe = "/".join(part if len(part.encode()) <= _LONGEST_PART else _shorten(part) for part in parts) or "image"
    if taken is None:
        return safe
    unique, number = safe, 2
    while unique.lower() in taken:
        unique, number = f"{safe}-{number}", number + 1
    taken.add(unique.lower())
    return unique


def _shorten(part: str) -> str:
    start = part.encode()[: _LONGEST_PART - 17].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(part.encode()).hexdigest()[:16]}"
