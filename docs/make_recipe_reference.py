"""Write ``docs/recipes.md`` from the comments of ``v2flow_cli/recipe/schema.py``.

    python docs/make_recipe_reference.py

Standard library only: the schema is read as text, so nothing is imported and each field is explained in one place.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parent
SCHEMA = DOCS.parent / "v2flow_cli" / "recipe" / "schema.py"
REFERENCE = DOCS / "recipes.md"

INTRODUCTION = """\
# Recipes

<!-- Written by docs/make_recipe_reference.py from v2flow_cli/recipe/schema.py; edit that file, then run this one. -->

A recipe is one YAML file that holds everything on which the result of a training depends. Its `kind` selects one of
the trees below. A key without a default is required. Unknown, missing and mistyped keys are reported together, each
with its path and the nearest valid name. Rules that involve several keys (`v2flow_cli/recipe/rules.py`) are checked
before anything is loaded.

    v2flow train recipes/tiny/autoencoder.yaml --set data.sources=[photos/] --set train.steps=20
    v2flow train recipes/default/tokenizer.yaml --dry-run
    v2flow finetune-llm recipes/default/lm.yaml --set 'text=[my/*.txt]'

`--set` takes a dotted path and a YAML value, and overrides the file. The resolved recipe is saved as `recipe.yaml` in
the output folder.

| folder | recipes |
|---|---|
| `recipes/tiny/` | runs of seconds |
| `recipes/default/` | the embedded model ([default model](default-model.md)) |
| `recipes/paper/`, `recipes/flextok/` | the models that the papers describe |
| `recipes/ablation/` | short runs that compare settings |
"""


@dataclass(frozen=True)
class Field:
    name: str
    annotation: str
    default: str  # empty where the key is required
    meaning: str


@dataclass(frozen=True)
class Section:
    """A dataclass of the schema."""

    name: str
    meaning: str
    fields: tuple[Field, ...]


def read_sections(source: str) -> dict[str, Section]:
    """The dataclasses of the schema's text, by name, in order.

    A field's meaning is the comment on its line, or the comment lines directly above it.
    """
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines = source.splitlines()

    def meaning(field: ast.AnnAssign) -> str:
        line = field.end_lineno or field.lineno
        if line in comments:
            return comments[line]
        above: list[str] = []
        line = field.lineno - 1
        while lines[line - 1].lstrip().startswith("#"):
            above.insert(0, comments[line])
            line -= 1
        return " ".join(above)

    sections = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            fields = tuple(
                Field(
                    item.target.id,
                    ast.unparse(item.annotation),
                    "" if item.value is None else ast.unparse(item.value),
                    meaning(item),
                )
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            )
            sections[node.name] = Section(node.name, ast.get_docstring(node) or "", fields)
    return sections


def reference(source: str) -> str:
    """The page for the schema's text."""
    sections = read_sections(source)
    recipes = [s for s in sections.values() if s.name.endswith("Recipe")]
    parts = [INTRODUCTION]
    for recipe in recipes:
        kind = recipe.fields[0].annotation.removeprefix("Literal['").removesuffix("']")
        parts += [f"## kind: {kind}\n", _text(recipe.meaning) + "\n", _table(recipe, sections)]
    parts.append("## Sections\n")
    for section in sections.values():
        if section not in recipes:
            parts += [f"### {section.name}\n", _text(section.meaning) + "\n", _table(section, sections)]
    return "\n".join(parts)


def _text(text: str) -> str:
    return text.replace("``", "`").replace("|", "&#124;")


def _table(section: Section, sections: dict[str, Section]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in section.fields:
        kind = _type(field.annotation)
        for base in field.annotation.split(" | "):
            if base in sections:
                kind = re.sub(rf"\b{base}\b", f"[{base}](#{base.lower()})", kind)
        default = f"`{field.default}`" if field.default else "required"
        rows.append(f"| `{field.name}` | {kind} | {default} | {_text(field.meaning)} |")
    return "\n".join(rows) + "\n"


def _type(annotation: str) -> str:
    """An annotation in the words of a YAML file."""
    return ", or ".join(_one_type(part) for part in annotation.split(" | "))


def _one_type(annotation: str) -> str:
    tree = ast.parse(annotation, mode="eval").body
    if not (isinstance(tree, ast.Subscript) and isinstance(tree.value, ast.Name)):
        return "null" if annotation == "None" else annotation
    items = tree.slice.elts if isinstance(tree.slice, ast.Tuple) else [tree.slice]
    words = [ast.unparse(item) for item in items]
    if tree.value.id == "Literal":
        return ", ".join(f"`{ast.literal_eval(item)}`" for item in items)
    return f"list of {words[0]}" if words[-1] == "..." else f"list of {len(words)} {words[0]}"


if __name__ == "__main__":
    REFERENCE.write_text(reference(SCHEMA.read_text(encoding="utf-8")), encoding="utf-8")
