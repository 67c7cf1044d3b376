"""Gzipped tars, unpacked once into a temporary file, so that any sample can be read by one seek."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import tempfile
import threading
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

from v2flow_cli.errors import DataError

_MAX_FILES = 16  # unpacked tars at a time: as many as a training stream keeps open
_MAGIC = b"\x1f\x8b"


class _Unpacked:
    """The temporary files of this process, with the least recently used removed first, and all when it ends."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, Path] = OrderedDict()
        self._folder = tempfile.TemporaryDirectory(prefix="v2flow-")
        self.process = os.getpid()
        self._lock, self._numbers = threading.Lock(), itertools.count()

    def get(self, path: Path) -> Path:
        stat = os.stat(path)
        name = f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}"
        with self._lock:
            if name not in self._files:
                while len(self._files) >= _MAX_FILES:
                    self._files.popitem(last=False)[1].unlink(missing_ok=True)
                self._files[name] = _unpack(path, Path(self._folder.name, f"{next(self._numbers)}.tar"))
            self._files.move_to_end(name)
            return self._files[name]


_unpacked: _Unpacked | None = None


def open_plain(path: str | Path) -> BinaryIO:
    """``path`` open for reading; if it is gzipped, its unpacked content under the same name.

    A truncated gzipped file gives the content before the cut.
    Raises: OSError; DataError for a gzipped file with a wrong checksum, and if there is no room to unpack it.
    """
    global _unpacked
    file = open(path, "rb")
    if file.read(2) != _MAGIC:
        file.seek(0)
        return file
    file.close()
    if _unpacked is None or _unpacked.process != os.getpid():  # a fork must not remove its parent's files
        _unpacked = _Unpacked()
    raw = io.FileIO(_unpacked.get(Path(path)))
    raw.name = str(path)  # its name in messages
    return io.BufferedReader(raw)


def _unpack(path: Path, target: Path) -> Path:
    try:
        with open(target, "wb") as out, gzip.open(path, "rb") as content:
            try:
                while chunk := content.read1(1 << 16):  # read would lose the bytes just before the cut
                    out.write(chunk)
            except (EOFError, zlib.error) as error:
                if not out.tell():  # else the tar in it ends there, which its reader notices
                    raise DataError(
                        f"{path}: gzipped, and nothing of it can be unpacked ({error}). Restore it."
                    ) from None
    except gzip.BadGzipFile as error:
        target.unlink(missing_ok=True)
        raise DataError(f"{path}: damaged at an unknown position ({error}). Restore it.") from None
    except OSError as error:
        target.unlink(missing_ok=True)
        raise DataError(
            f"{path}: cannot be unpacked into {target.parent} ({error.strerror}). Free some space, or set TMPDIR."
        ) from None
    return target
