"""Processes that are killed: forks of the test, so that thirty of them do not cost thirty imports of torch."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

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
