"""Bad steps and samples: what stops a training, and what is skipped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from v2flow_cli.errors import SharedError
from v2flow_cli.runtime.processes import gather_texts
from v2flow_cli.store.failures import Failure, budget_error, load_failures, over_budget
from v2flow_cli.store.files import append_line
from v2flow_cli.training.crops import CropBatch
from v2flow_cli.training.latent_cache import LatentBatch


def on_samples(what: str, keys: Sequence[str]) -> str:
    """``what`` with the samples on which it happened, the first eight by name; unchanged without keys."""
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    return f"{what} on samples {', '.join(keys[:8])}{more}" if keys else what


def what_is_wrong(where: str, loss: float, grad_norm: float, keys: Sequence[str], device: torch.device) -> str:
    """Why this step cannot be taken, the same text on every rank; empty if it can.

    Args:  loss, of this rank; grad_norm, of the mean gradient; keys, of this rank's samples in the step.
    """
    problem = "" if math.isfinite(loss) else on_samples(f"{where}: the loss is not finite ({loss})", keys)
    texts = [text for text in gather_texts(problem, device) if text]
    if not texts and not math.isfinite(grad_norm):  # of the mean gradient, so every rank sees it
        texts = [t for t in gather_texts(on_samples(f"{where}: the gradient is not finite", keys), device) if t]
    return "; ".join(texts)


@dataclass
class UnreadSteps:
    """Terms of the steps since the host last read them, because reading a number waits for all work of the GPU.

    Terms are tensors () by name, including ``loss`` and ``grad_norm``; keys are those of a step's samples.
    """

    steps: list[tuple[str, dict[str, Tensor], list[str]]] = field(default_factory=list)

    def add(self, where: str, terms: dict[str, Tensor], keys: list[str]) -> None:
        self.steps.append((where, terms, keys))

    def read(self) -> Iterator[tuple[dict[str, float], str]]:
        """Terms of each step, and its problem or ""; in one transfer."""
        if not self.steps:
            return
        device = self.steps[0][1]["loss"].device
        flat = [value.detach().float().to(device) for _, terms, _ in self.steps for value in terms.values()]
        numbers = iter(torch.stack(flat).tolist())
        steps, self.steps = self.steps, []
        for where, terms, keys in steps:
            values = {name: next(numbers) for name in terms}
            yield values, what_is_wrong(where, values["loss"], values["grad_norm"], keys, device)


def skip_or_stop(wrong: str, bad_steps: int, allowed: int, checkpoints: Path, log: Callable[[str], None]) -> None:
    """Log that a bad step is skipped, number ``bad_steps`` of them.

    Raises:  SharedError for more than the ``allowed`` number.
    """
    if bad_steps > allowed:
        raise SharedError(
            f"{wrong}. Resume from {checkpoints} with a lower optimizer.learning_rate, or allow train.skip_bad_steps."
        )
    log(f"{wrong}; skipped, {bad_steps} of {allowed}")


class BadSamples:
    """Every bad sample of any rank, once, the same on all ranks; the first rank writes them to ``path``.

    Args:   budget, share of the set that may be bad.
    """

    def __init__(
        self, path: Path, budget: float, log: Callable[[str], None], enabled: bool, device: torch.device
    ) -> None:
        self.path, self.budget, self.log, self.enabled, self.device = path, budget, log, enabled, device
        self.failures = dict.fromkeys(load_failures(path))  # of the run that this one continues

    def add(self, batch: CropBatch | LatentBatch) -> None:
        """Add the failures of ``batch`` on all ranks.

        Raises: SharedError, on every rank, when the budget is spent; DataError where the list cannot be written.
        """
        text = json.dumps([failure.as_json() for failure in batch.failures]) if batch.failures else ""
        records = [r for part in gather_texts(text, self.device) if part for r in json.loads(part)]
        new = [failure for failure in map(Failure.from_json, records) if failure not in self.failures]
        if not new:
            return
        self.failures.update(dict.fromkeys(new))
        if self.enabled:
            self._append(new)
        lost = list(self.failures)
        if over_budget(lost, batch.total - len(lost), self.budget):
            raise SharedError(str(budget_error(lost, self.budget)))

    def _append(self, failures: list[Failure]) -> None:
        for failure in failures:
            self.log(f"left out: {failure.name}: {failure.reason}")
            append_line(self.path, json.dumps(failure.as_json(), ensure_ascii=False))
