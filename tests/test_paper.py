"""docs/paper.md and the labels in the code agree: each departure and each open point has one label in both."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_departures_and_open_points_are_those_of_the_code():
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    on_page = {(label[0], label) for label in re.findall(r"^\| ([DS]\d+) \|", page, re.M)}
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "v2flow_cli").rglob("*.py"))
    marked = {(kind[0], label) for kind, label in re.findall(r"\b(Departs|Silent) \(([DS]\d+)\)", code)}
    assert marked == on_page


def test_every_tokenizer_of_the_paper_is_on_the_page():
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    paths = (ROOT / "recipes" / "paper").glob("*.yaml")
    files = {
        f"recipes/paper/{path.name}" for path in paths if "\nkind: tokenizer\n" in path.read_text(encoding="utf-8")
    }
    assert files and files <= {*re.findall(r"recipes/paper/[\w.-]+\.yaml", page)}
