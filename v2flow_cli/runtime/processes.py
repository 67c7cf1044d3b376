"""The processes of one launch (`accelerate launch`, torchrun): who is who, waiting for each other, adding up."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

# A rank that has finished waits for the slowest for as long as it takes; the launcher ends it when another one fails.
_PATIENCE = datetime.timedelta(days=30)


@dataclass(frozen=True)
class Ranks:
    """This process is number ``rank`` of ``count``."""

    rank: int = 0
    count: int = 1

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.count > 1:
            dist.barrier()

    def sum(self, numbers: Sequence[int]) -> list[int]:
        """The numbers of all ranks, added up, on every rank."""
        total = torch.tensor(numbers, dtype=torch.int64)
        if self.count > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, text: str) -> list[str]:
        """What every rank has to say, by rank, on every rank."""
        if self.count == 1:
            return [text]
        content = torch.tensor(list(text.encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(lengths, torch.tensor([len(content)]))
        row = torch.zeros(int(max(lengths)), dtype=torch.uint8)
        row[: len(content)] = content
        rows = [torch.empty_like(row) for _ in range(self.count)]
        dist.all_gather(rows, row)
        return [bytes(row[: int(n)].tolist()).decode() for row, n in zip(rows, lengths)]


@contextlib.contextmanager
def launched() -> Iterator[Ranks]:
    """The ranks of this launch by its environment (RANK, WORLD_SIZE, ...); one where there is no launcher.

    They talk through gloo on the CPU: little is said, and devices stay free.
    """
    ranks = Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if ranks.count > 1:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield ranks
    finally:
        if ranks.count > 1:
            dist.destroy_process_group()


def join_launch() -> None:
    """Let the processes of a launch find each other where there is no GPU: call it before accelerate looks around.

    Without this word torchrun's processes on CPUs each take themselves for the only one, and write the same files.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
