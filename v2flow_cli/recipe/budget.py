"""The file of ``v2flow budget``: the stages of a whole set of models, what each needs, and its share of the time.

kind: budget
folder: runs/default              # budget.json (what is done) and a log of every stage
stages:
  autoencoder: {recipe: autoencoder.yaml, share: 15}
  lm: {recipe: lm.yaml, share: 10}
  tokenizer: {recipe: tokenizer.yaml, share: 50, after: [autoencoder, lm]}
  tokens: {run: v2flow encode photos -o tokens --max-minutes {minutes}, share: 5, after: [tokenizer]}
  llm: {recipe: llm.yaml, share: 20, after: [tokens]}
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from v2flow_cli.errors import RecipeError
from v2flow_cli.recipe.load import load_recipe
from v2flow_cli.recipe.schema import Recipe

KIND = "budget"


@dataclass(frozen=True)
class Stage:
    """One training, or one command."""

    name: str
    share: float  # of the time, relative to the other stages on a path from the first to the last
    after: tuple[str, ...]  # stages that must be done before it starts; those it does not need run beside it
    again: bool | None  # whether a second run goes on with it; None: a training that no other training starts from
    recipe_path: Path | None = None  # of a training
    overrides: tuple[str, ...] = ()  # of its recipe, as --set takes them
    recipe: Recipe | None = None
    run: tuple[str, ...] = ()  # a command; {minutes} is its time


@dataclass(frozen=True)
class Budget:
    """The stages by name, each after those that it needs.  folder: where the run keeps its state and its logs."""

    path: Path
    folder: Path
    stages: dict[str, Stage]


def load_budget(path: str | Path, overrides: Iterable[str] = ()) -> Budget:
    """The budget at ``path``; ``overrides`` are STAGE.KEY=VALUE, of the stages' recipes.

    Recipes are found relative to the file; what they and the commands name, relative to the current folder.
    Raises:  RecipeError for a file that cannot be read, keys that are not known, stages that need each other in a
             circle or do not exist, and whatever is wrong with a recipe.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file. Give a budget, such as recipes/default/budget.yaml.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(tree, dict) or tree.get("kind") != KIND:
        raise RecipeError(f"{path}: expected `kind: {KIND}`, a folder and stages; a recipe is run by `v2flow train`.")
    _known(tree, ("kind", "folder", "stages"), str(path))
    stages = tree.get("stages")
    if not isinstance(tree.get("folder"), str) or not isinstance(stages, dict) or not stages:
        raise RecipeError(f"{path}: needs `folder`, a path, and `stages`, at least one.")
    by_stage: dict[str, list[str]] = {name: [] for name in stages}
    for override in overrides:
        name, _, rest = override.partition(".")
        if name not in stages or "=" not in rest:
            raise RecipeError(f"--set {override}: expected STAGE.KEY=VALUE, the stage one of {', '.join(stages)}.")
        by_stage[name].append(rest)
    made = {name: _stage(path, name, spec, by_stage[name]) for name, spec in stages.items()}
    _check_order(path, made)
    return Budget(path, Path(tree["folder"]), made)


def _stage(path: Path, name: str, spec: Any, overrides: list[str]) -> Stage:
    where = f"{path}: stages.{name}"
    if not isinstance(spec, dict) or ("recipe" in spec) == ("run" in spec):
        raise RecipeError(f"{where}: expected either `recipe`, the path of one, or `run`, a command.")
    _known(spec, ("recipe", "run", "set", "share", "after", "again"), where)
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
    place = path.parent / str(spec["recipe"])
    every = (*settings, *overrides)
    return Stage(name, float(share), tuple(after), again, place, every, load_recipe(place, every))


def _check_order(path: Path, stages: dict[str, Stage]) -> None:
    for name, stage in stages.items():
        for other in stage.after:
            if other not in stages:
                near = difflib.get_close_matches(other, stages, n=1)
                raise RecipeError(
                    f"{path}: stages.{name}.after names {other}, which is no stage"
                    f"{f'; did you mean {near[0]}?' if near else '.'}"
                )
    left = dict(stages)
    while ready := [name for name, stage in left.items() if not any(other in left for other in stage.after)]:
        for name in ready:
            del left[name]
    if left:
        raise RecipeError(f"{path}: the stages {', '.join(left)} wait for each other; `after` goes round in a circle.")


def _known(tree: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in tree:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(keys)}."
            raise RecipeError(f"{where}: {key} is not a known key; {hint}")
