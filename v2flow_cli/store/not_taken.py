"""Files that a command does not use: counted by kind and reason, with their first names.

A ``Failure``, in contrast, is an image that should have been used and could not be; only failures count towards the
error budget.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from v2flow_cli.store.failures import Failure
from v2flow_cli.store.text import printable

_ADDING = threading.Lock()  # images and captions are read in threads
_PLURAL = re.compile(r"\b(caption|file|folder|image|member|picture|sample|tar)s\b")
_SHOWN = 3  # names in a line of the log
_NAMED = 100  # names of a group that --json lists; the count is of all


@dataclass
class NotTaken:
    """The files of the inputs that a command does not use.  groups: by (kind, reason) the count and the first names.

    lost: folders that could not be read. They may hold images, so they are failures.
    """

    groups: dict[tuple[str, str], tuple[int, list[str]]] = field(default_factory=dict)
    lost: list[Failure] = field(default_factory=list)

    def add(self, name: str, kind: str, reason: str) -> None:
        """Count one file.  kind: such as ``.heic files``; reason: why it is not used."""
        self._add(kind, reason, 1, [printable(name)])

    def merge(self, other: NotTaken) -> None:
        for (kind, reason), (count, names) in other.groups.items():
            self._add(kind, reason, count, names)
        self.lost += other.lost

    def _add(self, kind: str, reason: str, count: int, names: list[str]) -> None:
        with _ADDING:
            before, listed = self.groups.get((kind, reason), (0, []))
            self.groups[kind, reason] = before + count, (listed + names)[:_NAMED]

    def __bool__(self) -> bool:
        return bool(self.groups or self.lost)

    def lines(self) -> list[str]:
        """One line a group: ``12 .heic files (a.heic, b.heic, c.heic and 9 more): the format is not supported``."""
        lines = []
        for (kind, reason), (count, names) in sorted(self.groups.items()):
            more = f" and {count - _SHOWN:,} more" if count > _SHOWN else ""
            kind = _PLURAL.sub(r"\1", kind, count=1) if count == 1 else kind
            lines.append(f"{count:,} {kind} ({', '.join(names[:_SHOWN])}{more}): {reason}")
        return lines

    def log(self, log: Callable[[str], None]) -> None:
        """Log one line a group."""
        for line in self.lines():
            log(f"not taken: {line}")

    def as_json(self) -> list[dict[str, Any]]:
        """For ``--json``: kind, reason, count and the first names of each group."""
        return [
            {"kind": kind, "reason": reason, "count": count, "names": names}
            for (kind, reason), (count, names) in sorted(self.groups.items())
        ]

    def dump(self) -> str:
        """JSON that another process can ``load``."""
        return json.dumps(self.as_json())

    @classmethod
    def load(cls, text: str) -> NotTaken:
        groups = {(g["kind"], g["reason"]): (g["count"], g["names"]) for g in json.loads(text)}
        return cls(groups)
