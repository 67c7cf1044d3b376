"""How a process ends before its command has: Ctrl-C at any moment, SIGTERM, and streams whose reader has gone.

Standard library only, since this is what has to be in place before anything slow is imported.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any, TextIO

EXIT_INTERRUPTED, EXIT_PIPE = 130, 141  # what a shell reports for SIGINT and SIGPIPE


def install() -> None:
    """Make Ctrl-C, SIGTERM and the standard streams behave as this module says; by the main thread, first of all."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, interrupt)
    sys.unraisablehook = _unraisable
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by `>&-`: the next file that is opened would become stdout
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # an encoding without a file's name spells it, as \xe9 or \udce9
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handler of SIGINT and SIGTERM: KeyboardInterrupt, so that temporary files go; exit code 130.

    An import that is broken off leaves half-made modules, and C extensions that turn the interrupt into an error of
    their own or drop it. Nothing is worth a clean-up then that the next run does not do, so the process ends at once.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            if os.environ.get("RANK", "0") == "0":
                os.write(2, b"interrupted\n")
            os._exit(EXIT_INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def let_go() -> None:
    """The command is over: from now on Ctrl-C ends the process without Python's traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def detach(stream: TextIO) -> None:
    """Send what is still written to ``stream`` nowhere, so that Python's last flush does not fail as well."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):  # no file behind it, as in a notebook
        pass


def _unraisable(event: Any) -> None:
    """An interrupt that arrives where Python cannot raise it (a destructor, a C callback) is sent once more."""
    if event.exc_type is KeyboardInterrupt:
        signal.raise_signal(signal.SIGINT)
    else:
        sys.__unraisablehook__(event)
