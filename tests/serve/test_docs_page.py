"""docs/serving.md against the server that it describes."""

import re
from pathlib import Path

import typer.main
from PIL import Image

from tests.serve.conftest import serving
from v2flow_cli.serve.__main__ import serve
from v2flow_cli.serve.errors import CODES
from v2flow_cli.serve.schemas import GenerationRequest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text("utf-8")
NEUTRAL = {"user", "quality", "background", "moderation", "stream"}  # accepted so that clients may send them


def test_the_client_code_of_the_page_runs(models, tmp_path, monkeypatch) -> None:
    [code] = [block for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S) if "from openai" in block]
    monkeypatch.chdir(tmp_path)
    with serving(models) as (url, _):
        exec(compile(code.replace("http://127.0.0.1:8000", url), "serving.md", "exec"), {})
    assert [Image.open(f"fox-{i}.png").size for i in (0, 1)] == [(32, 32)] * 2


def table(header: str) -> set[str]:
    """The text in backticks in the first column of the table whose header starts with ``header``."""
    rows = PAGE[PAGE.index(f"| {header}") :].partition("\n\n")[0].splitlines()[2:]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_the_tables_of_the_page_match_the_code() -> None:
    assert table("field") == set(GenerationRequest.model_fields) - NEUTRAL
    options = {option for parameter in typer.main.get_command(_app()).params for option in parameter.opts}
    assert table("option") <= options
    assert {option for option in options if option.startswith(("--max", "--timeout", "--url"))} == table("option")
    rows = PAGE[PAGE.index("| status") :].partition("\n\n")[0].splitlines()[2:]
    assert {int(row.split("|")[1]) for row in rows} == set(CODES) - {405} | {500}


def _app() -> typer.Typer:
    app = typer.Typer(add_completion=False)
    app.command()(serve)
    return app
