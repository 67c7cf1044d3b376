"""Divides the wall time of a budget: functions of shares, dependencies and the clock."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from v2flow_cli.recipe.budget import Stage


def longest_path(stages: Mapping[str, Stage], names: Collection[str], start: str) -> float:
    """The largest sum of shares on a path from ``start`` through those of ``names`` that depend on it."""
    followers = [name for name in names if start in stages[name].after]
    return stages[start].share + max((longest_path(stages, names, name) for name in followers), default=0.0)


def window(stages: Mapping[str, Stage], to_do: Collection[str], name: str, seconds_left: float) -> float:
    """Seconds for the stage ``name`` when it starts: its share of the time left, relative to the stages after it.

    Args:    to_do, the stages that are not done, including this one.
    """
    return seconds_left * stages[name].share / longest_path(stages, to_do, name)


def planned_windows(stages: Mapping[str, Stage], to_do: Collection[str], seconds: float) -> dict[str, float]:
    """Seconds of every stage if each takes exactly its share, for a table before the run."""
    longest = max(longest_path(stages, to_do, name) for name in to_do)
    return {name: seconds * stages[name].share / longest for name in to_do}


def is_continued(stages: Mapping[str, Stage], name: str) -> bool:
    """True if a second run continues a finished stage. A stage that a later training starts from stays unchanged."""
    stage = stages[name]
    if stage.again is not None:
        return stage.again
    return stage.recipe is not None and not any(other.recipe is not None for other in _followers(stages, name))


def _followers(stages: Mapping[str, Stage], name: str) -> list[Stage]:
    """All stages that depend on ``name``, directly or not."""
    direct = [stage for stage in stages.values() if name in stage.after]
    return direct + [later for stage in direct for later in _followers(stages, stage.name)]
