"""Processes that are killed: forks of the test, so that thirty of them do not cost thirty imports of torch."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch


def fork(function: Callable[[], None], environment: dict[str, str] | None = None, errors: Path | None = None) -> int:
    """The id of a process that runs ``function``; it ends with 0, or 1 and its exception in ``errors``."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(environment or {})
        torch.set_num_threads(1)
        function()
        code = 0
    except BaseException as error:
        if errors is not None:
            errors.write_text(f"{type(error).__name__}: {error}")
        else:
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def killed_at(number: int, out: Path, function: Callable[[], object]) -> None:
    """``function`` in a process that kills itself at its ``number``-th operation that changes a file under ``out``.

    A file that is opened for writing is empty then, and one that is appended to ends in half a line.
    """
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") or seen == number:
            return
        flags = args[2] if event == "open" else os.O_WRONLY
        folder = args[-1] if event in ("os.remove", "os.rmdir") else -1  # of shutil.rmtree
        place = f"{os.readlink(f'/proc/self/fd/{folder}') if folder > 0 else ''}{args[0]}"
        if str(out) not in place or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        seen += 1
        if seen == number:
            try:
                if event == "open" and flags & (os.O_TRUNC | os.O_APPEND):
                    torn = os.open(args[0], flags & ~os.O_EXCL, 0o644)
                    os.write(torn, b'{"half' if flags & os.O_APPEND else b"")
            finally:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    function()


def kills(out: Path, function: Callable[[], object], every: int = 1) -> Iterator[Path]:
    """``out`` as ``function`` leaves it, killed at each ``every``-th file operation there, until it is not killed.

    Each time it starts with what ``out`` holds now, and what is in ``out`` afterwards is left to the caller.
    """
    before = shutil.copytree(out, out.with_name(f"{out.name}-before"))
    for number in range(1, 10_000, every):
        shutil.rmtree(out)
        shutil.copytree(before, out)
        (code,) = wait([fork(partial(killed_at, number, out, function))], 120)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        yield out
    shutil.rmtree(before)


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in and under a folder, by path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def ranks(function: Callable[[], None], count: int, errors: Path | None = None) -> list[int]:
    """One process per rank of a launch, as torchrun would set them up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [
        fork(function, {**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, errors and errors / f"{r}.txt")
        for r in range(count)
    ]


def wait(pids: Sequence[int], seconds: float) -> list[int | None]:
    """Exit codes (negative: the signal) by process; None for one that is still there after ``seconds``, killed then."""
    codes: dict[int, int | None] = dict.fromkeys(pids)
    end = time.monotonic() + seconds
    while None in codes.values() and time.monotonic() < end:
        for pid in [p for p, code in codes.items() if code is None]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    for pid in [p for p, code in codes.items() if code is None]:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [codes[pid] for pid in pids]
