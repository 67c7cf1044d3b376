"""Early ends of a process: Ctrl-C at any moment, SIGTERM, and closed streams.

It uses only the standard library, because it has to be installed before anything slow is imported.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from types import FrameType
from typing import Any, TextIO

EXIT_INTERRUPTED, EXIT_PIPE = 130, 141  # a shell's codes for SIGINT and SIGPIPE


def install() -> None:
    """Install the handlers of this module; the main thread calls it first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, interrupt)
    sys.unraisablehook = _unraisable
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by `>&-`: the next opened file would become stdout
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:  # so Python starts with a closed one; libraries and `isatty` need a file
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):  # characters outside the encoding are escaped, as \xe9 or \udce9
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    buffer = getattr(sys.stderr, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # without a buffer under PYTHONUNBUFFERED
    if isinstance(raw, io.FileIO) and not isinstance(raw, _Lossy):
        lossy = io.BufferedWriter(_Lossy(raw.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(lossy, sys.stderr.encoding, "backslashreplace", line_buffering=True)


class _Lossy(io.FileIO):
    """Standard error: a message that cannot be written is lost, which does not stop the work.

    Its reader may have gone, its disk may be full, its terminal may have been closed. Here, and not where v2flow logs,
    because libraries, warnings and progress bars write to it too.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handler of SIGINT and SIGTERM: KeyboardInterrupt, so that temporary files are removed; exit code 130.

    During an import the process ends at once: an interrupted import leaves incomplete modules, and C extensions may
    turn the interrupt into another error or ignore it. There is nothing to clean up then.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            if os.environ.get("RANK", "0") == "0":
                os.write(2, b"interrupted\n")
            os._exit(EXIT_INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def restore_sigint() -> None:
    """After the command, let Ctrl-C end the process without Python's traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def detach(stream: TextIO) -> None:
    """Discard further output to ``stream``, so that Python's last flush does not fail too."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):  # not a file, as in a notebook
        pass


def _unraisable(event: Any) -> None:
    """Send an interrupt again if Python could not raise it (in a destructor or a C callback)."""
    if event.exc_type is KeyboardInterrupt:
        signal.raise_signal(signal.SIGINT)
    else:
        sys.__unraisablehook__(event)
