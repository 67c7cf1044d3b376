"""The log of a training: means of every loss term, as text and as JSON; a resumed run writes the same log."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from v2flow_cli.store.files import append_line, write_bytes
from v2flow_cli.store.text import whole_lines
from v2flow_cli.training.state import TrainState


class Meter:
    """Means of every loss term between two log lines; JSONL in the output folder, a short line in the log."""

    def __init__(self, path: Path, log: Callable[[str], None], enabled: bool) -> None:
        self.path, self.log, self.enabled = path, log, enabled
        self.last: dict[str, float] = {}
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.images, self.waited, self.start = 0, 0.0, time.monotonic()

    def as_json(self) -> dict[str, Any]:
        """The sums that are not logged yet, for a checkpoint."""
        names = ("last", "sums", "counts", "images", "waited")
        return {**{name: getattr(self, name) for name in names}, "elapsed": time.monotonic() - self.start}

    def resume(self, saved: dict[str, Any], step: int) -> None:
        """Restore the result of ``as_json``, and drop the lines after ``step``."""
        for name in ("last", "sums", "counts", "images", "waited"):
            setattr(self, name, saved[name])
        self.start = time.monotonic() - saved["elapsed"]
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step``, and the incomplete line of a killed run."""
        if not self.enabled or not self.path.is_file():
            return
        content = self.path.read_bytes()
        lines = "".join(f"{line}\n" for line in whole_lines(content) if json.loads(line)["step"] <= step).encode()
        if lines != content:
            write_bytes(self.path, lines)

    def add(self, terms: Mapping[str, float], images: int) -> None:
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.images += images

    def write(self, state: TrainState, learning_rate: float, figures: Mapping[str, float]) -> dict[str, float]:
        """Log and return the means since the last line, and the current ``figures``.

        Raises:  DataError where they cannot be written.
        """
        elapsed = max(time.monotonic() - self.start, 1e-9)
        means = {name: self.sums[name] / self.counts[name] for name in self.sums}
        self.last = {f"train/{name}": value for name, value in {**means, **figures}.items()}
        record = {
            "step": state.step,
            "images_seen": state.images_seen,
            **self.last,
            "learning_rate": learning_rate,
            "images_per_second": self.images / elapsed,
            "data_wait_share": self.waited / elapsed,
            "seconds": round(state.seconds, 1),
        }
        if torch.cuda.is_available():
            record["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.enabled:
            append_line(self.path, json.dumps(record))
            text = "  ".join(f"{k.removeprefix('train/')} {v:.4g}" for k, v in self.last.items())
            self.log(f"step {state.step}  {text}  {record['images_per_second']:.1f} img/s")
        self._reset()
        return record
