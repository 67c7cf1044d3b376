"""Communication between the processes of one launch (`accelerate launch`, torchrun): all collectives are called here.

Without a launch every function returns the result of a single process. ``device`` is that of the exchanged tensors: the
process's GPU if the launch uses NCCL, else the CPU.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from v2flow_cli.errors import SharedError, V2FlowError

# A finished rank waits for the slowest without a limit; the launcher ends it when another rank fails.
_TIMEOUT = datetime.timedelta(days=30)
CPU = torch.device("cpu")
Result = TypeVar("Result")


def world_size() -> int:
    """The number of processes of the launch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (M, ...) of every process, by rank, on every process; each has the same M."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def sum_in_place(tensor: Tensor) -> Tensor:
    """Replace ``tensor`` by its sum over all processes, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def copy_from_first(tensor: Tensor) -> Tensor:
    """Replace ``tensor`` by that of the first process, and return it."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def maximum(values: Sequence[float]) -> list[float]:
    """The maximum of each value over all processes, on every process; the hosts exchange it without the GPUs."""
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_hosts())
    return tensor.tolist()


@functools.cache
def _hosts() -> dist.ProcessGroup | None:
    """The group that exchanges CPU tensors. With NCCL each exchange would wait for all work of its GPU."""
    group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    return group if isinstance(group, dist.ProcessGroup) else None


def gather_texts(text: str, device: torch.device = CPU) -> list[str]:
    """The text of every process, by rank, on every process; one small exchange if all texts are empty."""
    if world_size() == 1:
        return [text]
    content = torch.tensor(list(text.encode("utf-8", "backslashreplace")), dtype=torch.uint8, device=device)
    lengths = gather_rows(torch.tensor([len(content)], device=device)).tolist()
    if not any(lengths):
        return [""] * len(lengths)
    row = torch.zeros(1, max(lengths), dtype=torch.uint8, device=device)
    row[0, : len(content)] = content
    return [bytes(r[:n]).decode() for r, n in zip(gather_rows(row).tolist(), lengths)]


def raise_everywhere(problem: str, device: torch.device) -> None:
    """Raises: SharedError with the problems of all processes, on every process; nothing if all texts are empty."""
    problems = [text for text in gather_texts(problem, device) if text]
    if problems:
        raise SharedError(" ".join(dict.fromkeys(problems)))


def on_every_rank(compute: Callable[[], Result], device: torch.device) -> Result:
    """``compute()`` of this process.  Raises: SharedError, on every process, for a V2FlowError of any of them."""
    try:
        result = compute()
    except V2FlowError as error:
        raise_everywhere(str(error), device)
    raise_everywhere("", device)
    return result


@contextlib.contextmanager
def losing_contact(where: Callable[[], str]) -> Iterator[None]:
    """Turn the error of a collective whose peer has ended into a V2FlowError that starts with ``where()``."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if not isinstance(error, dist.DistError) and not any(s in text for s in ("gloo", "nccl", "closed by peer")):
            raise
        raise V2FlowError(
            f"{where()}: lost contact with another process of this launch; see its own message, or the launcher's. "
            "Continue with --resume."
        ) from error


@dataclass(frozen=True)
class Processes:
    """This process is number ``rank`` of ``count``; they exchange CPU tensors."""

    rank: int = 0
    count: int = 1

    def wait(self) -> None:
        """Return when every process has called this."""
        if self.count > 1:
            dist.barrier()

    def sum(self, numbers: Sequence[int]) -> list[int]:
        """Each number summed over all processes, on every process."""
        return sum_in_place(torch.tensor(numbers, dtype=torch.int64)).tolist()


@contextlib.contextmanager
def launch() -> Iterator[Processes]:
    """The processes of this launch by its environment (RANK, WORLD_SIZE, ...); a single one without a launcher.

    They communicate through gloo on the CPU: messages are small, and devices stay free.
    """
    processes = Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if processes.count > 1:
        dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield processes
    finally:
        if processes.count > 1:
            dist.destroy_process_group()


def prepare_cpu_launch() -> None:
    """Let accelerate connect the processes of a launch without GPUs; call it before the first Accelerator.

    Without this each of torchrun's processes would run alone, and all would write the same files.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
