"""Samples and files that could not be used, with the reason, and the error budget."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v2flow_cli.errors import DataError, TokenFileError
from v2flow_cli.store.files import write_bytes
from v2flow_cli.store.text import printable, whole_lines


@dataclass(frozen=True)
class Failure:
    """A sample or file that could not be used, and why.

    source: a file, or the shard of the sample ``key``; samples: how many are lost, None if unknown.
    """

    source: str
    reason: str
    key: str | None = None
    samples: int | None = 1

    @classmethod
    def of(
        cls, error: DataError | TokenFileError, source: str | Path, key: str | None = None, samples: int | None = 1
    ) -> Failure:
        """The failure for the reason ``error``, whose message may begin with the names of ``source`` and ``key``."""
        reason = str(error)
        for name in (f"{source}/{key}", str(source)):
            reason = reason.removeprefix(f"{name}: ").removeprefix(f"{printable(name)}: ")
        return cls(str(source), reason, key, samples)

    @property
    def name(self) -> str:
        return printable(self.source if self.key is None else f"{self.source}/{self.key}")

    def as_json(self) -> dict[str, str | int | None]:
        return {
            "source": printable(self.source),
            "key": None if self.key is None else printable(self.key),
            "reason": printable(self.reason),
            "samples": self.samples,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Failure:
        """The inverse of ``as_json``; files of earlier versions call the source ``shard``."""
        source = record["source"] if "source" in record else record["shard"]
        return cls(source, record["reason"], record["key"], record["samples"])


def over_budget(failures: Iterable[Failure], good: int, budget: float) -> bool:
    """True if more than the share ``budget`` of all samples is bad, or an unknown number of them."""
    lost = [failure.samples for failure in failures]
    if None in lost:
        return budget < 1
    bad = sum(count for count in lost if count)
    return bad > budget * (good + bad)


def budget_error(failures: Sequence[Failure], budget: float) -> DataError:
    """The error for a training set that is ``over_budget``."""
    first, more = failures[0], f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    return DataError(
        f"{first.name}: {first.reason.rstrip('.')}{more}. This exceeds the error budget of {budget:.2%} of the "
        "samples. Restore the data, or raise data.error_budget."
    )


def save_failures(path: Path, failures: Iterable[Failure]) -> None:
    """Write one JSON object a line: source, key, reason, samples."""
    lines = [json.dumps(failure.as_json(), ensure_ascii=False) + "\n" for failure in failures]
    write_bytes(path, "".join(lines).encode("utf-8", "backslashreplace"))


def load_failures(path: Path) -> list[Failure]:
    """The failures in a file of ``save_failures``; empty if there is none.  Raises: DataError for a damaged file."""
    try:
        return [Failure.from_json(json.loads(line)) for line in whole_lines(path.read_bytes())]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not a list of bad samples ({error}). Remove it and run again.") from error
