"""The Dockerfile was never built where this is tested, so what it names is checked instead."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINES = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text("utf-8")).splitlines()


def of(instruction: str) -> list[str]:
    return [line.removeprefix(f"{instruction} ") for line in LINES if line.startswith(f"{instruction} ")]


def test_what_it_copies_exists_and_is_not_ignored() -> None:
    ignore = (ROOT / ".dockerignore").read_text("utf-8").split()
    sources = [source for line in of("COPY") for source in line.split()[:-1]]
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert ignore[0] == "*" and [source for source in sources if f"!{source}" not in ignore] == []
    needed = {"README.md", "LICENSE", "v2flow_cli", "pyproject.toml"}  # what the build backend reads
    assert needed <= set(sources)


def test_what_it_installs_and_starts_exists() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    [extras] = [match for line in of("RUN") for match in re.findall(r'"\.\[(.*?)\]"', line)]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    [start] = of("CMD")
    command = json.loads(start)
    modules = [command[2], *re.findall(r"python -m (\S+)", "\n".join(LINES))]
    assert modules and all(importlib.util.find_spec(f"{module}.__main__") for module in modules)
    assert of("USER") == ["v2flow"] and LINES.index("USER v2flow") < LINES.index(f"CMD {start}")


def test_the_ports_are_the_defaults_of_the_commands() -> None:
    for port, module in zip(of("EXPOSE")[0].split(), ("serve", "demo")):
        assert f"] = {port},\n" in (ROOT / "v2flow_cli" / module / "__main__.py").read_text("utf-8")
