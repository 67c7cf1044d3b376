"""Whole commands in forks of the test's process, which cost no new interpreter and no imports of torch.

A fork starts with the standard streams, arguments and user that a shell would give it, and ends as Python ends.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import v2flow_cli.cli.app  # noqa: F401  (once, and not in each fork)

EXIT_FLUSH = 120  # of Python, where a standard stream cannot be flushed at the end


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code (negative: the signal), and what it wrote to streams that were kept."""

    code: int
    out: str
    err: str


def run(
    entry: str | Callable[[], Any],
    *arguments: object,
    out: str = "kept",
    err: str = "kept",
    stdin: str = "null",
    encoding: str = "utf-8",
    obeys: bool = False,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
) -> Ended:
    """``entry``, a module whose ``main`` is called or a function, as a process of its own.

    Args:   out, err: kept; closed (``>&-``); gone (a pipe without a reader); full (/dev/full). stdin: null or closed.
            encoding, of the streams; ascii is what LC_ALL=C makes of them. obeys, the permissions of files, which root
            does not otherwise.
    """
    main = importlib.import_module(entry).main if isinstance(entry, str) else entry
    with tempfile.TemporaryFile() as out_file, tempfile.TemporaryFile() as err_file:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                kept = (os.dup(out_file.fileno()), os.dup(err_file.fileno()))
                _streams(stdin, (out, err), kept, encoding)
                os.environ.update(environment or {})
                os.chdir(cwd or os.getcwd())
                if obeys:
                    obey_permissions()
                torch.set_num_threads(1)
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
                sys.argv = ["v2flow" if isinstance(entry, str) else main.__module__, *map(str, arguments)]
                code = _ended(main)
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        texts = []
        for file in (out_file, err_file):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "backslashreplace"))
    return Ended(os.waitstatus_to_exitcode(status), *texts)


def obey_permissions() -> None:
    """From now on root, too, reads and writes what the bits of its files allow; for other users nothing changes.

    Raises:  OSError where this is not possible.
    """
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the capabilities, of this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, the low and the high bits
    if libc.capget(header, sets) == 0:
        for kind in (0, 1):  # effective, and permitted, which access(2) asks
            sets[kind] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
        if libc.capset(header, sets) == 0:
            return
    raise OSError(ctypes.get_errno(), "capset")


def _streams(stdin: str, names: Sequence[str], kept: Sequence[int], encoding: str) -> None:
    """Descriptors 0 to 2, and the objects that Python makes of them at its start: None for a closed one."""
    null = os.open(os.devnull, os.O_RDONLY)
    full = os.open("/dev/full", os.O_WRONLY)
    reader, gone = os.pipe()
    os.close(reader)
    for number, name in enumerate((stdin, *names)):
        if name == "closed":
            os.close(number)
        else:
            os.dup2({"null": null, "full": full, "gone": gone, "kept": kept[number - 1]}[name], number)
    for descriptor in (null, full, gone, *kept):
        os.close(descriptor)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            raw = io.FileIO(number, "r" if number == 0 else "w", closefd=False)
        except OSError:
            stream = None
        else:
            buffered: Any = io.BufferedReader(raw) if number == 0 else io.BufferedWriter(raw)
            errors = "backslashreplace" if number == 2 else "surrogateescape" if encoding == "ascii" else "strict"
            stream = io.TextIOWrapper(buffered, encoding, errors, line_buffering=number == 2)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _ended(main: Callable[[], Any]) -> int:
    """The exit code of ``main`` as the interpreter's: of SystemExit, of an exception, of a stream left unwritten."""
    code: Any = 0
    try:
        code = main()
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            code = EXIT_FLUSH
            if stream is sys.stdout and sys.stderr is not None:
                print(f"Exception ignored while flushing {stream}", file=sys.stderr, flush=True)
    return int(code or 0)
