"""The journal of a running ``encode``: OUT/.unfinished/, which exists until it ends.

    .unfinished/plan.jsonl   the keys that the run writes
    .unfinished/0.jsonl      of process 0, a line for each finished token file: key, rows, fingerprint of its input

A repeated run keeps finished files whose inputs have not changed. A reader uses the journal to tell complete token
files from others before a manifest lists them.
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
from v2flow_cli.store.files import append_line, write_bytes
from v2flow_cli.store.text import whole_lines

FOLDER = ".unfinished"
_PLAN = "plan.jsonl"


@dataclass(frozen=True)
class Finished:
    """A complete token file.  rows: images in it; source: the fingerprint of its input."""

    rows: int
    source: str


class Unfinished:
    """The journal of the run that is writing tokens into ``out``, if there is one."""

    def __init__(self, out: Path) -> None:
        self.folder, self._removed = out / FOLDER, out / f"{FOLDER}.partial"

    @property
    def exists(self) -> bool:
        return self.folder.is_dir()

    def begin(self, keys: Iterable[str], resumed: bool) -> None:
        """Start the journal; one process calls it, before any token file is written."""
        shutil.rmtree(self._removed, ignore_errors=True)
        if self.exists and not resumed:
            self.remove()
        lines = [*(json.dumps(key) for key in sorted({*keys, *self.planned()})), ""]
        write_bytes(self.folder / _PLAN, "\n".join(lines).encode())

    def planned(self) -> set[str]:
        """The keys that the run writes, finished or not."""
        return set(self._records(self.folder / _PLAN))

    def add(self, rank: int, key: str, finished: Finished) -> None:
        """Add a complete token file.  Raises: DataError if the journal cannot be written."""
        path = self.folder / f"{rank}.jsonl"
        record = {"key": key, "rows": finished.rows, "source": finished.source}
        append_line(path, json.dumps(record))

    def finished(self) -> dict[str, Finished]:
        """The complete token files of all processes, by key."""
        files = {}
        for path in self.folder.glob("[0-9]*.jsonl"):
            for record in self._records(path):
                files[record["key"]] = Finished(record["rows"], record["source"])
        return files

    def remove(self) -> None:
        """Remove the journal atomically; one process calls it, when everything is written and listed."""
        os.replace(self.folder, self._removed)
        shutil.rmtree(self._removed)

    @staticmethod
    def _records(path: Path) -> list[Any]:
        try:
            return [json.loads(line) for line in whole_lines(path.read_bytes())]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error}). Remove {path.parent}, or use --force.") from None
