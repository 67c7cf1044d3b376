"""What the ranks of a training tell each other, so that all of them stop, skip and save together."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from v2flow_cli.errors import SharedError, V2FlowError
from v2flow_cli.store.failures import Failure


def largest(accelerator: Accelerator, value: float) -> float:
    """The largest of all ranks' values, on every rank."""
    if accelerator.num_processes == 1:
        return value
    return accelerator.gather(torch.tensor([value], device=accelerator.device)).max().item()


def texts_of_all(accelerator: Accelerator, text: str) -> list[str]:
    """What each rank has to say, by rank; one small exchange where all are silent (empty lists then)."""
    if accelerator.num_processes == 1:
        return [text] if text else []
    content = text.encode("utf-8", "backslashreplace")
    longest = int(largest(accelerator, float(len(content))))
    if not longest:
        return []
    row = torch.zeros(longest, dtype=torch.uint8, device=accelerator.device)
    row[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
    rows = accelerator.gather(row).view(-1, longest).cpu()
    return [bytes(row.tolist()).rstrip(b"\0").decode() for row in rows]


def raise_everywhere(accelerator: Accelerator, problem: str) -> None:
    """Returns where no rank has a problem.  Raises: SharedError with those of all ranks, on every rank."""
    problems = [text for text in texts_of_all(accelerator, problem) if text]
    if problems:
        raise SharedError(" ".join(dict.fromkeys(problems)))


def share_failures(accelerator: Accelerator, failures: Sequence[Failure]) -> list[Failure]:
    """The bad samples that any rank has met, on every rank."""
    text = json.dumps([failure.as_json() for failure in failures]) if failures else ""
    records = [r for part in texts_of_all(accelerator, text) if part for r in json.loads(part)]
    return [Failure(r["shard"], r["reason"], r["key"], r["samples"]) for r in records]


def on_samples(what: str, keys: Sequence[str]) -> str:
    """``what`` happened on which samples, the first eight by name; alone where they have none."""
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    return f"{what} on samples {', '.join(keys[:8])}{more}" if keys else what


def what_is_wrong(accelerator: Accelerator, where: str, loss: Tensor, grad_norm: Any, keys: Sequence[str]) -> str:
    """Why this step cannot be taken, the same text on every rank; empty where it can.

    Args:  loss, of this rank; grad_norm, of the mean gradient; keys, of the samples that this rank saw in the step.
    """
    mine = "" if torch.isfinite(loss).item() else on_samples(f"{where}: the loss is not finite ({loss.item()})", keys)
    texts = [text for text in texts_of_all(accelerator, mine) if text]
    if not texts and not math.isfinite(float(grad_norm)):  # of the mean gradient, so every rank sees it
        texts = [t for t in texts_of_all(accelerator, on_samples(f"{where}: the gradient is not finite", keys)) if t]
    return "; ".join(texts)


def skip_or_stop(wrong: str, bad_steps: int, allowed: int, checkpoints: Path, log: Callable[[str], None]) -> None:
    """Say that step number ``bad_steps`` of the bad ones is skipped.

    Raises:  SharedError when that is more than are ``allowed``.
    """
    if bad_steps > allowed:
        raise SharedError(
            f"{wrong}. Resume from {checkpoints} with a lower optimizer.learning_rate, or allow train.skip_bad_steps."
        )
    log(f"{wrong}; skipped, {bad_steps} of {allowed}")


@contextmanager
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
