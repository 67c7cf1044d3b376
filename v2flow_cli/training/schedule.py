"""Divides the wall time of a budget: functions of shares, dependencies and the clock."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from v2flow_cli.recipe.budget import Stage


def longest_path(stages: Mapping[str, Stage], to_do: Collection[str], start: str) -> float:
    """The largest sum of shares on a path from ``start`` through what depends on it; only ``to_do`` counts."""
    share = stages[start].share if start in to_do else 0.0
    followers = [name for name, stage in stages.items() if start in stage.after]
    return share + max((longest_path(stages, to_do, name) for name in followers), default=0.0)


def window(stages: Mapping[str, Stage], to_do: Collection[str], name: str, seconds_left: float) -> float:
    """Seconds for the stage ``name`` when it starts: its share of the time left, relative to the stages after it.

    Args:    to_do, the stages that are not done, including this one.
    """
    return seconds_left * stages[name].share / longest_path(stages, to_do, name)


def planned_windows(stages: Mapping[str, Stage], to_do: Collection[str], seconds: float) -> dict[str, float]:
    """Seconds of every stage if each takes exactly its share, for a table before the run."""
    longest = max(longest_path(stages, to_do, name) for name in to_do)
    return {name: seconds * stages[name].share / longest for name in to_do}
