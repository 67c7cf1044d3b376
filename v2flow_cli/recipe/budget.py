"""The file of ``v2flow budget``: the stages of a set of models, their order, and their shares of the time.

kind: budget
folder: runs/default              # budget.json (the state) and a log of every stage
stages:
  autoencoder: {recipe: autoencoder.yaml, share: 15}
  lm: {recipe: lm.yaml, share: 10}
  tokenizer: {recipe: tokenizer.yaml, share: 50, after: [autoencoder, lm]}
  tokens: {run: v2flow encode photos -o tokens --max-minutes {minutes}, share: 5, after: [tokenizer]}
  llm: {recipe: llm.yaml, share: 20, after: [tokens]}
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from v2flow_cli.errors import RecipeError, did_you_mean
from v2flow_cli.recipe.load import load_recipe
from v2flow_cli.recipe.schema import Recipe

KIND = "budget"


@dataclass(frozen=True)
class Stage:
    """One training, or one command."""

    name: str
    share: float  # of the time, relative to the other stages on a path from the first to the last
    after: tuple[str, ...]  # stages that must be done before it starts; others run at the same time
    again: bool | None  # whether a second run continues it; None: only a training that no other training starts from
    recipe_path: Path | None = None  # of a training
    overrides: tuple[str, ...] = ()  # of its recipe, as --set takes them
    recipe: Recipe | None = None
    run: tuple[str, ...] = ()  # a command; {minutes} is its time


@dataclass(frozen=True)
class Budget:
    """The stages by name, each after those that it needs.  folder: of the run's state and logs."""

    path: Path
    folder: Path
    stages: dict[str, Stage]


def load_budget(path: str | Path, overrides: Iterable[str] = (), only: Collection[str] = ()) -> Budget:
    """The budget at ``path``; ``overrides`` are STAGE.KEY=VALUE, of the stages' recipes.

    With ``only`` it has these stages and those that they need. Paths of recipes are relative to the file; paths in
    recipes and commands are relative to the current folder.
    Raises:  RecipeError for a file that cannot be read, unknown keys, stages that do not exist or depend on each other
             in a circle, and invalid recipes.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file. Name a budget, such as recipes/default/budget.yaml.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(tree, dict) or tree.get("kind") != KIND:
        raise RecipeError(f"{path}: expected `kind: {KIND}`, a folder and stages; run a recipe with `v2flow train`.")
    _check_keys(tree, ("kind", "folder", "stages"), str(path))
    stages = tree.get("stages")
    if not isinstance(tree.get("folder"), str) or not isinstance(stages, dict) or not stages:
        raise RecipeError(f"{path}: needs `folder`, a path, and `stages`, at least one.")
    by_stage: dict[str, list[str]] = {name: [] for name in stages}
    for override in overrides:
        name, _, rest = override.partition(".")
        if name not in stages or "=" not in rest:
            raise RecipeError(f"--set {override}: expected STAGE.KEY=VALUE, the stage one of {', '.join(stages)}.")
        by_stage[name].append(rest)
    parsed = {name: _stage(path, name, spec, by_stage[name]) for name, spec in stages.items()}
    _check_order(path, parsed)
    for name in only:
        if name not in parsed:
            hint = did_you_mean(name, parsed) or f"; its stages: {', '.join(parsed)}."
            raise RecipeError(f"{path}: {name} is not a stage{hint}")
    if only:
        needed = set(only).union(*(ancestors(parsed, name) for name in only))
        for name in needed ^ parsed.keys():
            if by_stage[name]:
                raise RecipeError(f"--set {name}.{by_stage[name][0]}: --only leaves this stage out.")
        # A stage that is left out may start from one of these, or have changed its output.
        again = {name: name in only and is_continued(parsed, name) for name in needed}
        parsed = {name: dataclasses.replace(parsed[name], again=again[name]) for name in parsed if name in needed}
    return Budget(path, Path(tree["folder"]), parsed)


def ancestors(stages: Mapping[str, Stage], name: str) -> set[str]:
    """All stages that ``name`` depends on, directly or not."""
    direct = set(stages[name].after)
    return direct.union(*(ancestors(stages, other) for other in direct))


def is_continued(stages: Mapping[str, Stage], name: str) -> bool:
    """True if a second run continues a finished stage. A stage that a later training starts from stays unchanged."""
    stage = stages[name]
    if stage.again is not None:
        return stage.again
    followers = [other for other in stages.values() if name in ancestors(stages, other.name)]
    return stage.recipe is not None and not any(other.recipe is not None for other in followers)


def _stage(path: Path, name: str, spec: Any, overrides: list[str]) -> Stage:
    where = f"{path}: stages.{name}"
    if not isinstance(spec, dict) or ("recipe" in spec) == ("run" in spec):
        raise RecipeError(f"{where}: expected either `recipe`, the path of one, or `run`, a command.")
    _check_keys(spec, ("recipe", "run", "set", "share", "after", "again"), where)
    share, after, again = spec.get("share"), spec.get("after", []), spec.get("again")
    if isinstance(share, bool) or not isinstance(share, int | float) or share <= 0:
        raise RecipeError(f"{where}.share is {share!r}; expected a number above 0.")
    if not isinstance(after, list) or not all(isinstance(other, str) for other in after):
        raise RecipeError(f"{where}.after is {after!r}; expected a list of stages.")
    if again is not None and not isinstance(again, bool):
        raise RecipeError(f"{where}.again is {again!r}; expected true or false.")
    if "run" in spec:
        words = shlex.split(spec["run"]) if isinstance(spec["run"], str) else spec["run"]
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise RecipeError(f"{where}.run is {spec['run']!r}; expected a command, or a list of its words.")
        return Stage(name, float(share), tuple(after), again, run=tuple(words))
    settings = spec.get("set", [])
    if not isinstance(settings, list) or not all(isinstance(setting, str) for setting in settings):
        raise RecipeError(f"{where}.set is {settings!r}; expected a list of KEY=VALUE.")
    recipe_path, overrides = path.parent / str(spec["recipe"]), [*settings, *overrides]
    recipe = load_recipe(recipe_path, overrides)
    return Stage(name, float(share), tuple(after), again, recipe_path, tuple(overrides), recipe)


def _check_order(path: Path, stages: dict[str, Stage]) -> None:
    for name, stage in stages.items():
        for other in stage.after:
            if other not in stages:
                hint = did_you_mean(other, stages) or "."
                raise RecipeError(f"{path}: stages.{name}.after names {other}, which is no stage{hint}")
    waiting = dict(stages)
    while ready := [name for name, stage in waiting.items() if not any(other in waiting for other in stage.after)]:
        for name in ready:
            del waiting[name]
    if waiting:
        raise RecipeError(f"{path}: the stages {', '.join(waiting)} wait for each other; `after` forms a circle.")


def _check_keys(tree: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in tree:
        if key not in keys:
            hint = did_you_mean(key, keys) or f"; known keys: {', '.join(keys)}."
            raise RecipeError(f"{where}: {key} is not a known key{hint}")
