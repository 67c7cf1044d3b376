"""Checks that a run may resume from a checkpoint: the same recipe and number of processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from v2flow_cli.errors import ModelError
from v2flow_cli.recipe.load import dump_recipe, parse_recipe
from v2flow_cli.recipe.retired import without_retired
from v2flow_cli.store.paths import real_path, user_path

# Keys that a resumed run may change, because they do not change the computation of a step.
FREE_TO_CHANGE = set(
    "max_minutes log_every save_every save_minutes eval_every sample_every save_dtype keep_checkpoints skip_bad_steps "
    "workers error_budget output tracker grid_every license datasets compile refine_steps".split()
)
BUDGETED = "train.budgeted"
# Keys whose values are paths if they exist: `photos`, `photos/` and `/home/me/photos` are one folder.
PATHS = {"sources", "photos", "token_sets", "text", "cache", "autoencoder", "tokenizer", "llm", "init_from"}


def check_same_recipe(where: Path, saved: str, recipe: str) -> None:
    """Raises: ModelError if two recipes, as ``dump_recipe`` writes them, differ in the computation of a step."""
    tree, changed = without_retired(yaml.safe_load(saved), rename=True)
    # Keys that are newer than the saved recipe get their defaults, which change nothing.
    before = _flat(yaml.safe_load(dump_recipe(parse_recipe(tree, str(where)))))
    now = _flat(yaml.safe_load(recipe))
    free = FREE_TO_CHANGE | ({"steps", "accumulate"} if before.get(BUDGETED) and now.get(BUDGETED) else set())
    changed += [
        f"{key}: {before.get(key)} before, {now.get(key)} now"
        for key in sorted({*before, *now})
        if key.split(".")[-1] not in free and _resolved(key, before.get(key)) != _resolved(key, now.get(key))
    ]
    if changed:
        raise ModelError(
            f"{where}: the recipe is not that of this run ({'; '.join(changed[:6])}). Resume with the "
            "recipe beside the checkpoints, or start again in another `output`."
        )


def _resolved(key: str, value: Any) -> Any:
    """``value``; existing files and folders as absolute paths without links."""
    if key.split(".")[-1] not in PATHS or not isinstance(value, str | list):
        return value
    paths = [value] if isinstance(value, str) else value
    return [real_path(path) if os.path.exists(user_path(path)) else path for path in paths]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def check_same_ranks(
    where: Path, saved: int, ranks: int, *, parts: str, approximate: bool, log: Callable[[str], None]
) -> None:
    """Raises: ModelError for another number of processes; if ``approximate`` allows it, logs what will differ.

    ``parts``: the random numbers that each process draws for itself, in words.
    """
    if saved == ranks:
        return
    if not approximate:
        raise ModelError(
            f"{where}: saved by {saved} processes, resumed by {ranks}: {parts} would differ. Launch {saved} "
            "processes, or allow it with --approximate."
        )
    log(
        f"approximate resume: {saved} processes before, {ranks} now. Every photo is still used once per epoch; {parts} "
        "are not those of an uninterrupted run."
    )
