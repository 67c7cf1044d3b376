"""Keys of earlier versions that recipes may still have, and how they are read now.

A key whose value changes nothing is dropped silently, because every recipe that an earlier version wrote beside a model
or checkpoint has all keys of that version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Retired:
    """A key that was removed or renamed."""

    neutral: float | None  # the value that changes nothing; None: every value
    advice: str  # the end of a sentence that starts with "this key"
    new_key: str = ""  # its new name, in the same section


_NO_GAIN = "was removed, because controlled runs gained nothing from it (docs/paper.md, Controlled runs); delete it"
RETIRED = {
    "vocabulary.temperature_steps": Retired(0, f"{_NO_GAIN}, and set vocabulary.temperature alone"),
    "vocabulary.temperature_start": Retired(None, _NO_GAIN),
    "loss.isometry": Retired(0, _NO_GAIN),
    "loss.isometry_steps": Retired(None, _NO_GAIN),
    "loss.commit_ramp_steps": Retired(0, f"{_NO_GAIN}, and set loss.commit alone"),
    "gist_loss": Retired(0, "is called caption_contrast now", new_key="caption_contrast"),
}


def without_retired(tree: Mapping[str, Any], rename: bool = False) -> tuple[dict[str, Any], list[str]]:
    """``tree`` without its retired keys, and one sentence for each of them that would change the result.

    With ``rename`` a key that has a new name is renamed; without it, its sentence names the new key.
    """
    current = {key: dict(value) if isinstance(value, Mapping) else value for key, value in tree.items()}
    problems = []
    for dotted, retired in RETIRED.items():
        *section, key = dotted.split(".")
        mapping = current.get(section[0]) if section else current
        if not isinstance(mapping, dict) or key not in mapping:
            continue
        value = mapping.pop(key)
        if rename and retired.new_key:
            mapping[retired.new_key] = value
        elif retired.neutral is not None and not _equal(value, retired.neutral):
            problems.append(f"{dotted} is {value!r}; this key {retired.advice}")
    return current, problems


def _equal(value: Any, number: float) -> bool:
    try:
        return float(value) == number
    except (TypeError, ValueError):
        return False
