"""Read a recipe, apply ``--set`` overrides, validate it whole, and write the resolved one back."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from v2flow_cli.errors import RecipeError, did_you_mean, foreign_errors
from v2flow_cli.recipe.retired import without_retired
from v2flow_cli.recipe.rules import broken_rules
from v2flow_cli.recipe.schema import KINDS, Recipe


def load_recipe(path: str | Path, overrides: Iterable[str] = (), kinds: Iterable[str] = tuple(KINDS)) -> Recipe:
    """The recipe at ``path`` with ``a.b=value`` overrides applied, checked against the schema.

    Raises:  RecipeError listing every unknown, missing and mistyped key at once, with dotted paths.
    """
    path = Path(os.path.expanduser(path))
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe. Give the path of a YAML file, such as one of recipes/.") from None
    except OSError as error:
        raise RecipeError(f"{path}: the recipe cannot be read ({error}).") from None
    with foreign_errors(f"{path}: not valid YAML", kind=RecipeError):  # also invalid dates, and deep nesting
        tree = yaml.safe_load(content)  # bytes, so that YAML detects UTF-8 and UTF-16
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: found {type(tree).__name__}, expected a mapping with a top-level `kind`.")
    for override in overrides:
        _apply_override(tree, override, path)
    return parse_recipe(tree, where=str(path), kinds=kinds)


def parse_recipe(tree: Mapping[str, Any], where: str, kinds: Iterable[str] = tuple(KINDS)) -> Recipe:
    """The recipe in ``tree``, validated; ``where`` names its origin in messages."""
    kind, kinds = tree.get("kind"), tuple(kinds)
    if not isinstance(kind, str) or kind not in KINDS:
        raise RecipeError(f"{where}: kind is {kind!r}; expected one of {', '.join(KINDS)}.")
    if kind not in kinds:
        command = "v2flow train" if kind in ("autoencoder", "tokenizer") else "v2flow finetune-llm"
        raise RecipeError(f"{where}: this command does not run a recipe of kind {kind}; use `{command}`.")
    tree, problems = without_retired(tree)
    recipe = _build(KINDS[kind], tree, "", problems)
    if not problems:
        problems.extend(broken_rules(recipe))
    if problems:
        raise RecipeError(f"{where}: {len(problems)} problem(s):\n" + "\n".join(f"  - {p}" for p in problems))
    return cast(Recipe, recipe)


def parse_section(name: str, values: Any, where: str) -> Any:
    """One section of a tokenizer recipe from the plain values of a model's ``config.json``.

    Raises:  RecipeError if its keys are not the schema's.
    """
    problems: list[str] = []
    if isinstance(values, Mapping):  # keys of trainings in models of earlier versions
        values = without_retired({name: values})[0][name]
    section = _coerce(typing.get_type_hints(KINDS["tokenizer"])[name], values, name, problems)
    if problems:
        raise RecipeError(f"{where}: {'; '.join(problems)}.")
    return section


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that ``load_recipe`` reads back to an equal recipe."""
    return yaml.safe_dump(_plain(dataclasses.asdict(cast(Any, recipe))), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def _apply_override(tree: dict[str, Any], override: str, path: Path) -> None:
    key, sep, text = override.partition("=")
    if not sep or not all(key.split(".")):
        raise RecipeError(f"--set {override}: expected KEY=VALUE, such as --set train.steps=100.")
    with foreign_errors(f"--set {override}: the value is not valid YAML", kind=RecipeError):
        value = yaml.safe_load(text)
    node: Any = tree
    *parents, leaf = key.split(".")
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise RecipeError(f"--set {override}: {name} is a value in {path}, not a section.")
    node[leaf] = value


def _build(schema: type, tree: Any, prefix: str, problems: list[str]) -> Any:
    """An instance of the dataclass ``schema`` from ``tree``; None and entries in ``problems`` if it does not fit."""
    if not isinstance(tree, Mapping):
        problems.append(f"{prefix.rstrip('.') or 'recipe'} is {tree!r}; expected a section of keys")
        return None
    hints = typing.get_type_hints(schema)
    fields = {f.name: f for f in dataclasses.fields(schema)}
    for key in tree:
        if key not in fields:
            hint = did_you_mean(key, fields, prefix) or f"; known keys: {', '.join(fields)}"
            problems.append(f"{prefix}{key} is not a known key{hint}")
    values = {}
    for name, spec in fields.items():
        if name in tree:
            values[name] = _coerce(hints[name], tree[name], f"{prefix}{name}", problems)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            problems.append(f"{prefix}{name} is missing")
    return schema(**values) if not problems else None


def _variant(variants: list[Any], value: Any, where: str, problems: list[str]) -> Any:
    """The variant whose ``kind`` the section ``value`` names; the first if it names none."""
    if len(variants) == 1 or not isinstance(value, Mapping) or "kind" not in value:
        return variants[0]
    kinds = {typing.get_args(typing.get_type_hints(variant)["kind"])[0]: variant for variant in variants}
    if value["kind"] not in kinds:
        problems.append(f"{where}.kind is {value['kind']!r}; expected one of {', '.join(kinds)}")
    return kinds.get(value["kind"])


def _coerce(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(cast(type, hint), value, f"{where}.", problems)
    if origin in (types.UnionType, typing.Union):  # `X | None`, or sections with different `kind`
        if value is None and type(None) in args:
            return None
        variant = _variant([a for a in args if a is not type(None)], value, where, problems)
        return None if variant is None else _coerce(variant, value, where, problems)
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        names = [str(arg) for arg in args]
        problems.append(f"{where} is {value!r}; expected one of {', '.join(names)}{did_you_mean(value, names)}")
        return None
    if origin is tuple:
        variadic = len(args) == 2 and args[1] is Ellipsis
        if not isinstance(value, list | tuple) or (not variadic and len(value) != len(args)):
            problems.append(f"{where} is {value!r}; expected a list" + ("" if variadic else f" of {len(args)} values"))
            return None
        kinds = [args[0]] * len(value) if variadic else list(args)
        return tuple(_coerce(k, v, f"{where}[{i}]", problems) for i, (k, v) in enumerate(zip(kinds, value)))
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 2e-4 as a string
        except ValueError:
            pass
    if hint is str and isinstance(value, str) and value.startswith("~"):
        return os.path.expanduser(value)  # the home folder, as in a shell
    if type(value) is hint:
        return value
    problems.append(f"{where} is {value!r}; expected {hint.__name__}")
    return None
