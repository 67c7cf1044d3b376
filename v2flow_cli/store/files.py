"""Atomic writes, refusal to overwrite, hashes, and reading ahead in threads."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

from v2flow_cli.errors import DataError, UnwritableName
from v2flow_cli.store.names import temporary_name

if sys.platform != "win32":
    import fcntl

# The name is too long, not allowed on this file system, or that of both a file and a folder.
_NAME_ERRORS = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.EISDIR, errno.ENOTDIR)
_END = 65_536  # bytes at the beginning and end of a file that its fingerprint covers

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which gets the name ``path`` only if the block succeeds; its folders are created.

    Raises: DataError for a folder that cannot be written, or a full disk; UnwritableName if only the name is the
            reason, so that another file can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path) as file:
            try:
                yield file
                file.flush()
                if sys.platform == "win32":  # which renames no open file; elsewhere it stays locked until then
                    file.close()
                os.replace(file.name, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(file.name)
                raise
    except OSError as error:
        kind = UnwritableName if error.errno in _NAME_ERRORS else DataError
        raise kind(f"{path}: cannot be written ({error.strerror or error}).") from error


def _temporary(path: Path) -> BinaryIO:
    """An empty file beside ``path``, which takes the place of one that a killed writer of ``path`` left."""
    name = temporary_name(path.name)
    if sys.platform != "win32":
        shared = path.with_name(f"{name}.partial")
        file = open(shared, "wb", opener=_without_emptying)  # another process may be writing it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with its process
            if os.path.samestat(os.fstat(file.fileno()), os.stat(shared)):  # else it has got its name meanwhile
                file.truncate()
                return file
        except OSError:
            pass
        file.close()
    return open(path.with_name(f"{name}.{os.getpid()}.partial"), "wb")


def _without_emptying(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_TRUNC, 0o666)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically.  Raises: as ``replacing``."""
    with replacing(path) as file:
        file.write(content)


def append_line(path: Path, line: str, *, sync: bool = False) -> None:
    """Add a line to a file of lines, which is made where there is none; half a line that a killed process left goes.

    Args:   sync, wait until it is on the disk.
    Raises: DataError for a file that cannot be written, or a disk that is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            end = file.seek(0, os.SEEK_END)
            place = end
            while place:
                start = max(0, place - _END)
                file.seek(start)
                newline = file.read(place - start).rfind(b"\n")
                place = start + newline + 1 if newline >= 0 else start
                if newline >= 0:
                    break
            if place < end:
                file.truncate(place)
            file.write(line.encode("utf-8", "backslashreplace") + b"\n")
            if sync:
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}).") from error


def remove_partials(folder: Path) -> None:
    """Remove the temporary files of killed writers in and under ``folder``; no other process may be writing there."""
    for partial in folder.rglob(".*.partial"):
        if partial.is_file():
            partial.unlink()


def check_absent(paths: Iterable[Path], force: bool) -> None:
    """Refuse to overwrite.  Raises: DataError naming the first of ``paths`` that exists, unless ``force``."""
    existing = [] if force else [path for path in paths if path.exists()]
    if existing:
        more = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        raise DataError(f"{existing[0]}: exists already{more}. Use --force to overwrite, or another -o.")


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int) -> Iterator[Result]:
    """``map`` in threads, in order, with at most ``ahead`` results in progress or waiting."""
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(path: Path) -> str:
    """16 hex digits that change with the content of the file, but not with its path.

    They cover its size and the 64 KiB at either end, and for a longer file its time of modification.
    """
    try:
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            longer = stat.st_size > 2 * _END
            ends = file.read(_END)
            if longer:
                file.seek(-_END, os.SEEK_END)
            ends += file.read(_END)
    except OSError as error:
        return f"unreadable: {error.strerror}"
    stamp = f"{stat.st_size} {stat.st_mtime_ns if longer else ''}"
    return hashlib.sha256(stamp.encode() + ends).hexdigest()[:16]
