"""The headers of a tar, walked without trusting them: any damage that a tar can show is found, not skipped.

Tars carry a checksum for each header and none for data. So without a manifest a cut, a damaged header, a zeroed
block and a missing end are noticed; flipped bits inside a member, or in the long name of one, are not.
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
    """members: (name, offset, size) of every whole file; damaged_at: byte from which on nothing is known.

    Links have the place of the file that they lead to; left_out: (name, reason) of those that lead nowhere, and of
    whatever else is no regular file.
    """

    members: list[tuple[str, int, int]] = field(default_factory=list)
    damaged_at: int | None = None
    left_out: list[tuple[str, str]] = field(default_factory=list)


def scan_tar(path: Path) -> TarScan:
    """Every member of a tar up to its end, or to where it is damaged; a gzipped one is unpacked, else no data is read.

    Raises:  DataError for a file that is missing, cannot be read, or does not begin as a plain tar.
    """
    try:
        with open_plain(path) as file:
            return _scan(file, os.fstat(file.fileno()).st_size)
    except FileNotFoundError:
        raise DataError(f"{path}: no such shard.") from None
    except (OSError, tarfile.TarError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a whole tar ({error}).") from error


def _scan(file: BinaryIO, size: int) -> TarScan:
    scan, end = TarScan(), 0
    links: list[tuple[int, str, str]] = []  # how many members came before, name, name of the target
    with tarfile.open(fileobj=file, mode="r:") as tar:  # raises for a first header that is none
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
                tar.members = []  # type: ignore[attr-defined]  # the archive's own list would grow with it
        except (tarfile.TarError, ValueError, EOFError, OverflowError):
            scan.damaged_at = end
    _follow(links, scan)
    if scan.damaged_at is not None:
        return scan
    # tarfile takes a damaged or zeroed header, and the end of a cut file, for the end of the archive.
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
    """Put each link among the members, at its place, as the file that it leads to (another link in between is left)."""
    files = {posixpath.normpath(name): (offset, size) for name, offset, size in scan.members} if links else {}
    for before, name, target in reversed(links):
        if target in files:
            scan.members.insert(before, (name, *files[target]))
        else:
            scan.left_out.append((name, f"a link to {target}, which is not in the tar"))
