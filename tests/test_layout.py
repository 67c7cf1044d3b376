"""The shape of the project: imports never turn back, every command has a page, nothing unsafe is called."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "v2flow_cli"
DOCS = PACKAGE.parent / "docs"
# Each package, and the packages that it may import. `store` imports no model.
MAY_IMPORT = {
    "errors": set(),
    "auto_classes": {"tokenizer"},  # after a program has imported an Auto class of transformers
    "runtime": {"errors"},
    "recipe": {"errors"},
    "tokenizer": {"errors", "runtime", "recipe"},
    "store": {"errors", "runtime", "recipe"},
    "llm": {"errors", "runtime", "recipe", "tokenizer", "store"},
    "assets": {"errors", "store"},
    "jobs": {"errors", "runtime", "recipe", "tokenizer", "store", "llm"},
    "training": {"errors", "runtime", "recipe", "tokenizer", "store", "llm", "jobs"},
    "bench": {"errors", "runtime", "recipe", "tokenizer", "store", "llm", "jobs", "training", "assets"},
}
LAST = {"cli", "demo", "serve", "__main__"}  # the command line, the demo and the server may import everything
FILES = sorted(PACKAGE.rglob("*.py"))
UNSAFE = re.compile(
    r"allow_pickle\s*=\s*True|trust_remote_code\s*=\s*True|pickle\.load|torch\.load\(|\.cuda\(|except:\s*$", re.M
)


def package_of(path: Path) -> str:
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


def imported_packages(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("v2flow_cli"):
            module = (node.module or "").split(".")
            names |= {module[1]} if len(module) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("v2flow_cli.")}
    return names - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_order_of_the_packages(path):
    package = package_of(path)
    if package in LAST or package == "__init__":
        return
    found = imported_packages(ast.parse(path.read_text(encoding="utf-8"))) - {package}
    assert found <= MAY_IMPORT[package], f"{package} imports {found - MAY_IMPORT[package]}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_unsafe_is_called_and_only_the_command_line_knows_typer(path):
    text = path.read_text(encoding="utf-8")
    assert not UNSAFE.search(text)
    assert package_of(path) in LAST or "import typer" not in text


def test_every_command_has_a_page():
    from v2flow_cli.cli.app import app

    names = [command.name for command in (*app.registered_commands, *app.registered_groups)]
    assert sorted(names) == ["bench", "budget", "decode", "encode", "finetune-llm", "generate", "shard", "train"]
    assert [name for name in names if not (DOCS / f"{name}.md").is_file()] == []


def test_help_needs_no_heavy_import():
    import subprocess
    import sys

    heavy = "('torch', 'transformers', 'numpy', 'PIL')"
    code = f"import sys, v2flow_cli.cli.app; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
