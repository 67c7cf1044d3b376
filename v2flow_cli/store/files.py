"""Atomic writes, refusal to overwrite, hashes, and reading ahead in threads."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

from v2flow_cli.errors import DataError, UnwritableName
from v2flow_cli.runtime.permissions import set_default_mode
from v2flow_cli.store.names import temporary_name

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
    partial = path.with_name(temporary_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    except OSError as error:
        kind = UnwritableName if error.errno in _NAME_ERRORS else DataError
        raise kind(f"{path}: cannot be written ({error.strerror or error}).") from error
    finally:
        with contextlib.suppress(OSError):  # renamed after success; unreachable after a failed mkdir
            partial.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically.  Raises: as ``replacing``."""
    with replacing(path) as file:
        file.write(content)


def remove_partials(folder: Path) -> None:
    """Remove the temporary files of killed writers in and under ``folder``; no other process may be writing there."""
    for partial in folder.rglob(".*.partial"):
        if partial.is_file():
            partial.unlink()


@contextlib.contextmanager
def publishing(target: Path, prefix: str) -> Iterator[Path]:
    """A temporary folder, whose files move into ``target`` if the block succeeds; ``config.json`` moves last.

    Folders of killed writers in ``target`` with this ``prefix`` are removed; no other process may be writing there.
    Raises: OSError.
    """
    target.mkdir(parents=True, exist_ok=True)
    for stale in target.glob(f"{prefix}*"):
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(dir=target, prefix=prefix) as partial:
        yield Path(partial)
        for path in sorted(Path(partial).iterdir(), key=lambda p: p.name == "config.json"):
            if path.is_file():
                set_default_mode(path)
            os.replace(path, target / path.name)


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


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
