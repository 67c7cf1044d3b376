"""Reading WebDataset tars: an index of byte offsets, so that any sample is one seek and one read away.

``write_shards.py`` makes them.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from v2flow_cli.errors import DataError
from v2flow_cli.store.images import SUFFIXES, expand_input

_LONGEST_PART = 200  # bytes; file systems have room for 255, suffix included
_UNSAFE = re.compile(r'[\x00-\x1f\x7f\ud800-\udfff<>:"|?*.]')
_BLOCK = 512  # bytes; tar headers and data start at multiples of it


@dataclass(frozen=True)
class SampleIndex:
    """Where one sample of a shard lies.  members: extension (``jpg``) -> (offset, size) in bytes."""

    key: str
    members: dict[str, tuple[int, int]]

    @property
    def image(self) -> str | None:
        """The extension of the sample's image, the shortest where it has several; None where it has none."""
        images = [e for e in self.members if "." + e.rsplit(".", 1)[-1].lower() in SUFFIXES]
        return min(images, key=lambda e: (len(e), e), default=None)


def find_shards(inputs: Sequence[str | Path]) -> list[Path]:
    """The tars among files, folders (searched recursively) and globs, each once, sorted within an input.

    Raises: DataError for an input that does not exist or holds no ``.tar``.
    """
    shards: dict[Path, None] = {}
    for given in inputs:
        tars = [p for p in expand_input(str(given))[1] if p.suffix.lower() == ".tar"]
        if not tars:
            raise DataError(f"{given}: no .tar in it. `v2flow shard` makes tars from a folder of images.")
        shards.update(dict.fromkeys(sorted(tars)))
    return list(shards)


def index_shard(path: str | Path) -> list[SampleIndex]:
    """The samples of an uncompressed tar in the order of their first members; no member is read.

    The key is the name up to the first dot of its last part, as in WebDataset; members of one key need not be
    neighbours. Hidden members and whatever is not a regular file are left out.
    Raises: DataError for a tar that is missing, compressed, damaged, cut short, or repeats a member.
    """
    path = Path(path)
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    end = 0
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + (-(-member.size // _BLOCK) * _BLOCK if member.isreg() else 0)
                name = PurePosixPath(member.name).name
                if member.isreg() and not name.startswith(".") and "." in name:
                    _add(samples, member, path)
            # tarfile takes a damaged header, and the end of a cut file, for the end of the archive.
            file.seek(end)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise DataError(f"{path}: damaged or cut short at byte {end:,}, in sample {len(samples)}.")
    except FileNotFoundError:
        raise DataError(f"{path}: no such shard.") from None
    except (OSError, tarfile.TarError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a whole, uncompressed tar ({error}).") from error
    return [SampleIndex(key, members) for key, members in samples.items()]


def _add(samples: dict[str, dict[str, tuple[int, int]]], member: tarfile.TarInfo, path: Path) -> None:
    folder, _, name = member.name.rpartition("/")
    stem, _, extension = name.partition(".")
    members = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
    if extension in members:
        raise DataError(f"{path}: holds {member.name} twice. Write the shard again with unique keys.")
    members[extension] = (member.offset_data, member.size)


def read_member(file: BinaryIO, span: tuple[int, int]) -> bytes:
    """The bytes at (offset, size) of an open shard.  Raises: DataError if the file ends before them."""
    offset, size = span
    file.seek(offset)
    content = file.read(size)
    if len(content) != size:
        raise DataError(f"{file.name}: cut short at byte {offset + len(content):,}, inside a member.")
    return content


def read_captions(content: bytes) -> tuple[str, ...]:
    """One caption a line; blank lines are none, bytes that are not UTF-8 are replaced."""
    lines = content.decode("utf-8", errors="replace").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def captions_of(file: BinaryIO, sample: SampleIndex) -> tuple[str, ...]:
    """The captions in the sample's ``.txt`` member; none where it has no such member."""
    return read_captions(read_member(file, sample.members["txt"])) if "txt" in sample.members else ()


def iterate_shard(path: str | Path) -> Iterator[tuple[str, bytes, tuple[str, ...]]]:
    """(key, image bytes, captions) of each sample that has an image, in order, one in memory at a time."""
    samples = index_shard(path)
    with open(path, "rb") as file:
        for sample in samples:
            if sample.image is not None:
                yield sample.key, read_member(file, sample.members[sample.image]), captions_of(file, sample)


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
