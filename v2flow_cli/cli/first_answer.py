"""Less waiting for the first answer of a command: its imports, and the end of its process."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Import in this block without the cyclic garbage collector, which also skips the result from then on.

    What modules define lives as long as the process, but the collector would search it again and again: a tenth of the
    CPU time of ``generate``. Only the first block of a process has an effect: later on there may be garbage, which
    would be kept.
    """
    if gc.get_freeze_count() or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # extensions report what is not freed at the end as a leak


def leave(end: SystemExit) -> None:
    """After ``without_collection``, end the process now; otherwise return.

    Python would first free every object of torch and transformers, which takes longer than to draw a picture. What
    Python does before that is done here: it waits for threads, calls exit handlers and flushes the standard streams.
    A child process of ``multiprocessing`` ends like this too.
    """
    if not gc.get_freeze_count() or not isinstance(end.code, int):
        return
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # Python reports this
        return
    os._exit(end.code)
