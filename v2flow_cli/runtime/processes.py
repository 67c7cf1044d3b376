"""Communication between the processes of one launch (`accelerate launch`, torchrun): the only collectives we call.

Without a launch every function here returns what a single process has. ``device`` is where the exchanged tensors lie:
the process's GPU where the launch talks through NCCL, else the CPU.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from v2flow_cli.errors import SharedError, V2FlowError

# A rank that has finished waits for the slowest for as long as it takes; the launcher ends it when another one fails.
_PATIENCE = datetime.timedelta(days=30)
CPU = torch.device("cpu")


def world_size() -> int:
    """The number of processes that can talk to each other."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (M, ...) of every process, by rank, on every process; each has the same M."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def sum_in_place(tensor: Tensor) -> Tensor:
    """``tensor``, now the sum over all processes."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def copy_from_first(tensor: Tensor) -> Tensor:
    """``tensor``, now that of the first process."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def maximum(values: Sequence[float]) -> list[float]:
    """Of each value the largest over all processes, on every process; exchanged by the hosts, whatever GPUs do."""
    if world_size() == 1:
        return list(values)
    shared = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=_hosts())
    return shared.tolist()


@functools.cache
def _hosts() -> dist.ProcessGroup | None:
    """The group that exchanges CPU tensors. Through NCCL each exchange would wait for all that its GPU has to do."""
    group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    return group if isinstance(group, dist.ProcessGroup) else None


def gather_texts(text: str, device: torch.device = CPU) -> list[str]:
    """The text of every process, by rank, on every process; one small exchange where all texts are empty."""
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
    """Raises: SharedError with the problems of all processes, on every process; nothing where all texts are empty."""
    problems = [text for text in gather_texts(problem, device) if text]
    if problems:
        raise SharedError(" ".join(dict.fromkeys(problems)))


@contextlib.contextmanager
def losing_contact(where: Callable[[], str]) -> Iterator[None]:
    """Turns what a collective raises when another process has gone into a sentence that starts with ``where()``."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        gone = isinstance(error, dist.DistError) or any(sign in text for sign in ("gloo", "nccl", "closed by peer"))
        if not gone:
            raise
        raise V2FlowError(
            f"{where()}: lost contact with another process of this launch; its own message, or the launcher's, says "
            "why. Continue with --resume."
        ) from error


@dataclass(frozen=True)
class Processes:
    """This process is number ``rank`` of ``count``; the numbers and texts that they exchange lie on the CPU."""

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
    """The processes of this launch by its environment (RANK, WORLD_SIZE, ...); one where there is no launcher.

    They talk through gloo on the CPU: messages are small, and devices stay free.
    """
    processes = Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if processes.count > 1:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield processes
    finally:
        if processes.count > 1:
            dist.destroy_process_group()


def prepare_cpu_launch() -> None:
    """Let accelerate find the processes of a launch where there is no GPU; call it before the first Accelerator.

    Without this each of torchrun's processes on CPUs takes itself for the only one, and all write the same files.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
