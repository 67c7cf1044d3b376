"""What stops a training or lets it pass: steps that are not finite, and samples that cannot be read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from v2flow_cli.errors import ModelError, SharedError
from v2flow_cli.runtime.processes import gather_texts
from v2flow_cli.store.failures import Failure, budget_error, load_failures, over_budget
from v2flow_cli.training.crops import CropBatch
from v2flow_cli.training.latent_cache import LatentBatch


def on_samples(what: str, keys: Sequence[str]) -> str:
    """``what`` happened on which samples, the first eight by name; alone where they have none."""
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    return f"{what} on samples {', '.join(keys[:8])}{more}" if keys else what


def what_is_wrong(where: str, loss: float, grad_norm: float, keys: Sequence[str], device: torch.device) -> str:
    """Why this step cannot be taken, the same text on every rank; empty where it can.

    Args:  loss, of this rank; grad_norm, of the mean gradient; keys, of the samples that this rank saw in the step.
    """
    mine = "" if math.isfinite(loss) else on_samples(f"{where}: the loss is not finite ({loss})", keys)
    texts = [text for text in gather_texts(mine, device) if text]
    if not texts and not math.isfinite(grad_norm):  # of the mean gradient, so every rank sees it
        texts = [t for t in gather_texts(on_samples(f"{where}: the gradient is not finite", keys), device) if t]
    return "; ".join(texts)


@dataclass
class UnreadSteps:
    """Terms of the steps since the host last looked at them: reading a number makes it wait for all the GPU has to do.

    Terms are tensors () by name, ``loss`` and ``grad_norm`` among them; keys are those of a step's samples.
    """

    steps: list[tuple[str, dict[str, Tensor], list[str]]] = field(default_factory=list)

    def add(self, where: str, terms: dict[str, Tensor], keys: list[str]) -> None:
        self.steps.append((where, terms, keys))

    def read(self) -> Iterator[tuple[dict[str, float], str]]:
        """Terms of each step, and what is wrong with it, "" where nothing is; one transfer for all."""
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
    """Say that step number ``bad_steps`` of the bad ones is skipped.

    Raises:  SharedError when that is more than are ``allowed``.
    """
    if bad_steps > allowed:
        raise SharedError(
            f"{wrong}. Resume from {checkpoints} with a lower optimizer.learning_rate, or allow train.skip_bad_steps."
        )
    log(f"{wrong}; skipped, {bad_steps} of {allowed}")


class BadSamples:
    """Every bad sample that any rank has met, once, the same on all ranks; the first rank writes them to ``path``.

    Args:   budget, share of the set that may be bad.
    """

    def __init__(
        self, path: Path, budget: float, log: Callable[[str], None], enabled: bool, device: torch.device
    ) -> None:
        self.path, self.budget, self.log, self.enabled, self.device = path, budget, log, enabled, device
        self.seen = dict.fromkeys(load_failures(path))  # of the run that this one continues

    def add(self, batch: CropBatch | LatentBatch) -> None:
        """Take up what all ranks met while they made ``batch``.

        Raises: SharedError, on every rank, when the budget is spent; ModelError where the list cannot be written.
        """
        text = json.dumps([failure.as_json() for failure in batch.failures]) if batch.failures else ""
        records = [r for part in gather_texts(text, self.device) if part for r in json.loads(part)]
        new = [failure for failure in map(Failure.from_json, records) if failure not in self.seen]
        if not new:
            return
        self.seen.update(dict.fromkeys(new))
        if self.enabled:
            self._append(new)
        lost = list(self.seen)
        if over_budget(lost, batch.total - len(lost), self.budget):
            raise SharedError(str(budget_error(lost, self.budget)))

    def _append(self, failures: list[Failure]) -> None:
        for failure in failures:
            self.log(f"left out: {failure.name}: {failure.reason}")
        try:
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(json.dumps(f.as_json(), ensure_ascii=False) + "\n" for f in failures)
        except OSError as error:
            raise ModelError(f"{self.path}: cannot be written ({error.strerror}). Make room and resume.") from None
