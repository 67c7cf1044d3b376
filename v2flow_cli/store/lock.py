"""One run at a time in an output folder: a second one would overwrite the first one's checkpoints."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from v2flow_cli.errors import DataError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_HELD: set[int] = set()


def _close_in_child() -> None:
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


if hasattr(os, "register_at_fork"):  # a loader's worker that outlives a killed run must not hold its lock
    os.register_at_fork(after_in_child=_close_in_child)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int | None]:
    """Create ``folder`` and lock it; yields the file descriptor that holds the lock.

    The lock leaves no file. It ends with the block, or with this process and the programs that inherit the descriptor.
    On file systems without locks, and on Windows, there is none (None).

    Raises:  DataError if another process holds the lock.
    """
    if fcntl is None:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    _HELD.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            raise DataError(
                f"{folder}: another run is writing here. Wait for it, stop it, or choose another folder."
            ) from None
        except OSError:
            held = False
        yield descriptor if held else None
    finally:
        _HELD.discard(descriptor)
        os.close(descriptor)
