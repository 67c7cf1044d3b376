"""Keys that recipes of earlier versions may have: what became of each, and how it is read now.

A key whose value changes nothing is dropped without a word, since every recipe that an earlier version wrote beside a
model or checkpoint has all keys of its time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Retired:
    """``neutral``: the value that changes nothing, None where any does; ``advice`` ends a sentence on the key.

    ``new_key`` lies in the same section."""

    neutral: float | None
    advice: str
    new_key: str = ""


_NO_GAIN = "was removed, since controlled runs gained nothing by it (docs/paper.md, Controlled runs); delete it"
RETIRED = {
    "vocabulary.temperature_steps": Retired(0, f"{_NO_GAIN}, and set vocabulary.temperature alone"),
    "vocabulary.temperature_start": Retired(None, _NO_GAIN),
    "loss.isometry": Retired(0, _NO_GAIN),
    "loss.isometry_steps": Retired(None, _NO_GAIN),
    "loss.commit_ramp_steps": Retired(0, f"{_NO_GAIN}, and set loss.commit alone"),
    "gist_loss": Retired(0, "is called caption_contrast now", new_key="caption_contrast"),
}


def without_retired(tree: Mapping[str, Any], rename: bool = False) -> tuple[dict[str, Any], list[str]]:
    """``tree`` without its retired keys, and one sentence for each of them that changed what a run computes.

    With ``rename`` a key that has a new name moves there; without, its sentence asks for that.
    """
    kept = {key: dict(value) if isinstance(value, Mapping) else value for key, value in tree.items()}
    problems = []
    for dotted, retired in RETIRED.items():
        *section, key = dotted.split(".")
        holder = kept.get(section[0]) if section else kept
        if not isinstance(holder, dict) or key not in holder:
            continue
        value = holder.pop(key)
        if rename and retired.new_key:
            holder[retired.new_key] = value
        elif retired.neutral is not None and not _equal(value, retired.neutral):
            problems.append(f"{dotted} is {value!r}; this key {retired.advice}")
    return kept, problems


def _equal(value: Any, number: float) -> bool:
    try:
        return float(value) == number
    except (TypeError, ValueError):
        return False
