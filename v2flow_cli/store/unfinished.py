"""What an ``encode`` that has not ended has done so far: OUT/.unfinished/, from its beginning to its end.

    .unfinished/plan.jsonl   the keys that it is to write: what lies under them is its own
    .unfinished/0.jsonl      of process 0, a line for each finished token file: key, rows, fingerprint of its input

A repeated run keeps what is finished, if it was made of the same inputs; and a reader knows which of the token files
that no manifest lists yet are whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v2flow_cli.errors import DataError
from v2flow_cli.store.files import write_bytes
from v2flow_cli.store.text import whole_lines

FOLDER = ".unfinished"
_PLAN = "plan.jsonl"


@dataclass(frozen=True)
class Finished:
    """A token file that is whole.  rows: images in it; source: the fingerprint of the file it was made of."""

    rows: int
    source: str


class Unfinished:
    """The record of the run that is writing tokens into ``out``, if there is one."""

    def __init__(self, out: Path) -> None:
        self.folder, self._removed = out / FOLDER, out / f"{FOLDER}.partial"

    @property
    def exists(self) -> bool:
        return self.folder.is_dir()

    def begin(self, keys: Iterable[str], resumed: bool) -> None:
        """By one process, before any token file is written."""
        shutil.rmtree(self._removed, ignore_errors=True)
        if self.exists and not resumed:
            self.remove()
        lines = [*(json.dumps(key) for key in sorted({*keys, *self.planned()})), ""]
        write_bytes(self.folder / _PLAN, "\n".join(lines).encode())

    def planned(self) -> set[str]:
        """The keys that the run is to write, whichever of them are finished."""
        return set(self._records(self.folder / _PLAN))

    def add(self, rank: int, key: str, finished: Finished) -> None:
        """A token file more, once it is whole.  Raises: DataError where that cannot be written down."""
        path = self.folder / f"{rank}.jsonl"
        record = {"key": key, "rows": finished.rows, "source": finished.source}
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}).") from error

    def finished(self) -> dict[str, Finished]:
        """The token files that are whole, by key, of all processes."""
        found = {}
        for path in self.folder.glob("[0-9]*.jsonl"):
            for record in self._records(path):
                found[record["key"]] = Finished(record["rows"], record["source"])
        return found

    def remove(self) -> None:
        """By one process, when everything is written and listed; at once, whenever it is killed."""
        os.replace(self.folder, self._removed)
        shutil.rmtree(self._removed)

    @staticmethod
    def _records(path: Path) -> list[Any]:
        try:
            return [json.loads(line) for line in whole_lines(path.read_bytes())]
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error}). Remove {path.parent}, or use --force.") from None
