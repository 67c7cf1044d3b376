"""Reads the headers of a tar and reports all damage that they show.

Tars have a checksum for each header and none for data. Without a manifest, truncation, a damaged header, a zeroed block
and a missing end are detected; flipped bits inside a member, or in its long name, are not.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from v2flow_cli.errors import DataError
from v2flow_cli.store.gzipped import open_plain

_BLOCK = 512  # bytes; tar headers and data start at multiples of it


@dataclass
class TarScan:
    """members: (name, offset, size) of every intact file; damaged_at: byte after which the tar cannot be read.

    Links have the position of their target; left_out: (name, reason) of links without a target, and of all members that
    are no regular files.
    """

    members: list[tuple[str, int, int]] = field(default_factory=list)
    damaged_at: int | None = None
    left_out: list[tuple[str, str]] = field(default_factory=list)


def scan_tar(path: Path) -> TarScan:
    """Every member of a tar up to its end, or to its damage. A gzipped tar is unpacked; of others no data is read.

    Raises:  DataError for a file that is missing, cannot be read, or does not begin as a tar.
    """
    try:
        with open_plain(path) as file:
            return _scan(file, os.fstat(file.fileno()).st_size)
    except FileNotFoundError:
        raise DataError(f"{path}: no such shard.") from None
    except (OSError, tarfile.TarError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a complete tar ({error}).") from error


def _scan(file: BinaryIO, size: int) -> TarScan:
    scan, end = TarScan(), 0
    links: list[tuple[int, str, str]] = []  # number of members before it, name, name of the target
    with tarfile.open(fileobj=file, mode="r:") as tar:  # raises for an invalid first header
        try:
            while member := tar.next():
                if member.size < 0 or tar.offset <= end or tar.offset > size:
                    break
                if member.isreg() and not member.issparse():
                    scan.members.append((member.name, member.offset_data, member.size))
                elif member.islnk() or member.issym():
                    folder = "" if member.islnk() else posixpath.dirname(member.name)
                    target = posixpath.normpath(posixpath.join(folder, member.linkname))
                    links.append((len(scan.members), member.name, target))
                elif not member.isdir():
                    scan.left_out.append((member.name, "sparse" if member.issparse() else "neither file nor link"))
                end = tar.offset
                tar.members = []  # type: ignore[attr-defined]  # else the archive's own list would grow
        except (tarfile.TarError, ValueError, EOFError, OverflowError):
            scan.damaged_at = end
    _follow(links, scan)
    if scan.damaged_at is not None:
        return scan
    # tarfile treats a damaged or zeroed header, and the end of a truncated file, as the end of the archive.
    file.seek(end)
    if len(block := file.read(_BLOCK)) < _BLOCK:
        scan.damaged_at = end
    while block:
        if block.strip(b"\0"):
            scan.damaged_at = end
            break
        block = file.read(1 << 16)
    return scan


def _follow(links: list[tuple[int, str, str]], scan: TarScan) -> None:
    """Insert each link among the members, with the position of its target; links to links are left out."""
    files = {posixpath.normpath(name): (offset, size) for name, offset, size in scan.members} if links else {}
    for before, name, target in reversed(links):
        if target in files:
            scan.members.insert(before, (name, *files[target]))
        else:
            scan.left_out.append((name, f"a link to {target}, which is not in the tar"))
