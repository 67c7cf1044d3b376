"""The headers of a tar, walked without trusting them: any damage that a tar can show is found, not skipped.

Tars carry a checksum for each header and none for data. So without a manifest a cut, a damaged header, a zeroed
block and a missing end are noticed; flipped bits inside a member, or in the long name of one, are not.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from v2flow_cli.errors import DataError

_BLOCK = 512  # bytes; tar headers and data start at multiples of it


@dataclass
class TarScan:
    """members: (name, offset, size) of every whole regular file; damaged_at: byte from which on nothing is known."""

    members: list[tuple[str, int, int]] = field(default_factory=list)
    damaged_at: int | None = None


def scan_tar(path: Path) -> TarScan:
    """Every member of an uncompressed tar up to its end, or to where it is damaged; no data is read.

    Raises:  DataError for a file that is missing, cannot be read, or does not begin as a plain tar.
    """
    try:
        with open(path, "rb") as file:
            return _scan(file, path.stat().st_size)
    except FileNotFoundError:
        raise DataError(f"{path}: no such shard.") from None
    except (OSError, tarfile.TarError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a whole, uncompressed tar ({error}).") from error


def _scan(file: BinaryIO, size: int) -> TarScan:
    scan, end = TarScan(), 0
    with tarfile.open(fileobj=file, mode="r:") as tar:  # raises for a first header that is none
        try:
            while member := tar.next():
                if member.size < 0 or tar.offset <= end or tar.offset > size:
                    break
                if member.isreg() and not member.issparse():
                    scan.members.append((member.name, member.offset_data, member.size))
                end = tar.offset
                tar.members = []  # type: ignore[attr-defined]  # the archive's own list would grow with it
        except (tarfile.TarError, ValueError, EOFError, OverflowError):
            scan.damaged_at = end
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
