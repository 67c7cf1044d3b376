"""The samples that a training had to pass over: listed in a file, and too many of them stop it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

from v2flow_cli.errors import ModelError, SharedError
from v2flow_cli.store.failures import Failure, budget_error, load_failures, over_budget
from v2flow_cli.training.crops import CropBatch
from v2flow_cli.training.guard import share_failures
from v2flow_cli.training.latent_cache import LatentBatch


class BadSamples:
    """Every bad sample that any rank has met, once, the same on all ranks; the first rank writes them to ``path``.

    Args:   budget, share of the set that may be bad.
    """

    def __init__(self, path: Path, budget: float, log: Callable[[str], None], enabled: bool) -> None:
        self.path, self.budget, self.log, self.enabled = path, budget, log, enabled
        self.seen = dict.fromkeys(load_failures(path))  # of the run that this one continues

    def add(self, accelerator: Accelerator, batch: CropBatch | LatentBatch) -> None:
        """Take up what all ranks met while they made ``batch``.

        Raises: SharedError, on every rank, when the budget is spent; ModelError where the list cannot be written.
        """
        new = [f for f in share_failures(accelerator, batch.failures) if f not in self.seen]
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
