"""The manifest of a set of shards and the index beside each, which ``shard`` writes and readers check.

    shards/manifest.json             totals, schema; for each shard samples, bytes, SHA-256
    shards/set-000000.tar
    shards/set-000000.index.jsonl    a line a sample: {"key": "cats/1", "members": {"jpg": [offset, size, digest]}}

A digest is the first 16 hex digits of the SHA-256 of the member's bytes. It shows which samples of a damaged shard are
lost.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from v2flow_cli.errors import DataError, foreign_errors
from v2flow_cli.runtime.publishing import TARS, check_published
from v2flow_cli.store.files import write_bytes
from v2flow_cli.store.images import SUFFIXES

FORMAT, FORMAT_VERSION, MANIFEST = "v2flow-shards", 1, "manifest.json"
REPLACING = ".replacing"  # marks a folder while a new set replaces an old one
SCHEMA = {
    "jpg, png, webp": "one of them: the image, as encoded bytes",
    "txt": "its captions where it has any, one a line, UTF-8",
}


class Member(NamedTuple):
    """The position of a member's bytes in its shard, and their digest if the index has one."""

    offset: int
    size: int
    digest: str | None = None


@dataclass(frozen=True)
class SampleIndex:
    """The members of one sample of a shard, by extension (``jpg``)."""

    key: str
    members: dict[str, Member]

    @property
    def images(self) -> list[str]:
        """The extensions of the sample's images, the shortest first."""
        images = [e for e in self.members if "." + e.rsplit(".", 1)[-1].lower() in SUFFIXES]
        return sorted(images, key=lambda e: (len(e), e))

    @property
    def image(self) -> str | None:
        """The extension of the image that is used, the shortest; None if the sample has no image."""
        return next(iter(self.images), None)

    @property
    def end(self) -> int:
        """The byte after its last member."""
        return max(member.offset + member.size for member in self.members.values())


@dataclass(frozen=True)
class ShardInfo:
    """One shard in the manifest; index_sha256 is that of its index."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str | None = None


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def index_path(shard: Path) -> Path:
    """The path of a shard's index."""
    return shard.with_name(f"{shard.stem}.index.jsonl")


def index_lines(samples: Iterable[SampleIndex]) -> bytes:
    return "".join(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in samples).encode()


def save_manifest(folder: Path, shards: Sequence[ShardInfo], captions: int) -> None:
    """Write ``folder/manifest.json``."""
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "schema": SCHEMA,
        "samples": sum(shard.samples for shard in shards),
        "captions": captions,
        "bytes": sum(shard.bytes for shard in shards),
        "shards": [asdict(shard) for shard in shards],
    }
    write_bytes(folder / MANIFEST, json.dumps(record, indent=1).encode())


def load_manifest(folder: Path) -> dict[str, ShardInfo]:
    """The shards that ``folder/manifest.json`` lists, by name; empty if there is no manifest of shards.

    Raises:  DataError for a manifest that is damaged, inconsistent, or of a newer format version, and for a set whose
             replacement is in progress or was interrupted.
    """
    path = folder / MANIFEST
    check_published(folder, TARS, DataError)
    if (folder / REPLACING).exists():
        raise DataError(
            f"{folder}: a new set of shards is replacing this one, or was interrupted. If no `v2flow shard` "
            "is running, repeat its command, which finishes the replacement."
        )
    try:
        stamp = path.stat().st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return _load_manifest(path, stamp)


def check_manifest_is_ours(folder: Path) -> None:
    """Raises: DataError if ``folder/manifest.json`` is not that of a set of shards: it must not be overwritten."""
    path = folder / MANIFEST
    if not path.exists():
        return
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        record = None
    file_format = record.get("format") if isinstance(record, dict) else None
    if file_format != FORMAT:
        raise DataError(
            f"{path}: exists, and is not the manifest of a set of shards (format {file_format!r}; expected {FORMAT!r})."
            " It would be overwritten. Use another -o, or move it away."
        )


def missing_shards(folder: Path, tars: Iterable[Path]) -> list[Path]:
    """Shards that the manifests in and under ``folder`` list, but that are not among ``tars``."""
    tars = set(tars)
    folders = {folder, *(path.parent for path in tars if folder in path.parents)}
    return sorted(parent / name for parent in folders for name in load_manifest(parent) if parent / name not in tars)


@functools.lru_cache(maxsize=64)
def _load_manifest(path: Path, stamp: int) -> dict[str, ShardInfo]:
    advice = "Restore it, or remove it to read the shards without it."
    with foreign_errors(f"{path}: cannot be read as JSON", advice, DataError):
        record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        return {}
    version: Any = record.get("format_version")
    if type(version) is not int or version < 1:
        raise DataError(f"{path}: format_version is {version!r}; expected {FORMAT_VERSION}.")
    if version > FORMAT_VERSION:
        raise DataError(f"{path}: format version {version}; this v2flow reads up to {FORMAT_VERSION}. Update v2flow.")
    shards = record.get("shards")
    if not isinstance(shards, list) or not all(isinstance(s, dict) for s in shards):
        raise DataError(f"{path}: shards is not a list of objects. Restore it, or remove it.")
    infos: dict[str, ShardInfo] = {}
    for number, shard in enumerate(shards):
        info = _parse_shard(shard)
        if info is None or info.name in infos:
            raise DataError(
                f"{path}: entry {number} of shards is damaged or repeated; expected a name without folders, samples, "
                "bytes and sha256. Restore the manifest, or remove it."
            )
        infos[info.name] = info
    for name in ("samples", "bytes"):
        total = sum(getattr(info, name) for info in infos.values())
        if record.get(name) != total:
            raise DataError(f"{path}: {name} is {record.get(name)!r}, but the shards add up to {total}.")
    return infos


def _parse_shard(record: dict[str, Any]) -> ShardInfo | None:
    name, samples, size = record.get("name"), record.get("samples"), record.get("bytes")
    digest, index_digest = record.get("sha256"), record.get("index_sha256")
    if not isinstance(name, str) or not name.endswith(".tar") or "/" in name or "\\" in name or "\0" in name:
        return None
    if type(samples) is not int or samples < 1 or type(size) is not int or size < 1:
        return None
    if not isinstance(digest, str) or not isinstance(index_digest, str | None):
        return None
    return ShardInfo(name, samples, size, digest, index_digest)


def load_index(shard: Path, info: ShardInfo) -> list[SampleIndex] | None:
    """The samples of ``shard`` by its index; None if the manifest names no index, or it is missing or damaged."""
    path = index_path(shard)
    if info.index_sha256 is None:
        return None
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    if hashlib.sha256(content).hexdigest() != info.index_sha256:
        return None
    with foreign_errors(f"{path}: not an index of samples", "Run `v2flow shard` again.", DataError):
        return [_parse_sample(json.loads(line)) for line in content.split(b"\n") if line]


def _parse_sample(record: dict[str, Any]) -> SampleIndex:
    members = {extension: Member(*member) for extension, member in record["members"].items()}
    plain = all(type(m.offset) is type(m.size) is int and m.offset >= 0 <= m.size for m in members.values())
    if not isinstance(record["key"], str) or not members or not plain:
        raise ValueError(f"a sample is {str(record)[:80]}")
    return SampleIndex(record["key"], members)


def read_member(file: BinaryIO, member: Member) -> bytes:
    """The bytes of a member of an open shard.  Raises: DataError if they end early or differ from their digest."""
    try:
        file.seek(member.offset)
        content = file.read(member.size)
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read at byte {member.offset:,} ({error.strerror}).") from error
    if len(content) != member.size:
        raise DataError(f"{file.name}: truncated at byte {member.offset + len(content):,}, inside a member.")
    if member.digest is not None and digest_of(content) != member.digest:
        raise DataError(f"{file.name}: damaged in bytes {member.offset:,} to {member.offset + member.size:,}.")
    return content
