"""Help, tables, bars and messages at 40 and 80 columns: nothing is cut, and what is piped is not wrapped."""

import io
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pytest
import typer.main
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from v2flow_cli.assets import sample_photos
from v2flow_cli.bench.results import as_record, tables
from v2flow_cli.bench.run import run_bench
from v2flow_cli.cli import console
from v2flow_cli.cli.app import app
from v2flow_cli.cli.text_table import text_table
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.training import budget as budgets

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = (40, 80)
COMMANDS = typer.main.get_command(app).commands
NAMES = [(), *((name,) for name in COMMANDS), *(("bench", mode) for mode in COMMANDS["bench"].commands)]
LONG = "runs/a-tokenizer-with-a-very-long-name/step-00012345"
cells = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=30)


@pytest.fixture(params=WIDTHS)
def width(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


def v2flow(*arguments, code=0):
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


@pytest.mark.parametrize("name", NAMES, ids=" ".join)
def test_help(name, width):
    text = v2flow(*name, "--help").stdout
    command = COMMANDS[name[0]] if name else None
    command = command.commands[name[1]] if len(name) > 1 else command
    examples = (
        [line.strip() for line in (command.help or "").splitlines() if line.startswith("    ")] if command else []
    )
    lines = [line.strip() for line in text.splitlines()]
    assert examples or not name or name[0] == "bench"
    assert all(example in lines for example in examples if example)
    wide = [line for line in text.splitlines() if cell_len(line) > width and line.strip() not in examples]
    assert [line for line in wide if len(line.split()) > 1] == []
    flat = "".join(text.split())
    texts = [p.help for p in command.params] if command else []
    texts += [sub.get_short_help_str() for sub in getattr(command, "commands", {} if command else COMMANDS).values()]
    for whole in filter(None, texts):
        assert "".join(whole.split()) in flat
    for option in (o for p in (command.params if command else ()) for o in p.opts if o.startswith("-")):
        assert option in text


@given(st.data())
def test_tables_cut_no_cell_and_fit_the_width(data):
    columns = data.draw(st.integers(1, 6))
    heads, *rows = data.draw(st.lists(st.lists(cells, min_size=columns, max_size=columns), min_size=1, max_size=5))
    width = data.draw(st.integers(4, 120))
    lines = text_table(heads, rows, width).splitlines()
    for row in rows:
        assert all(any(cell in line for line in lines) for cell in row)
    alone = {*(cell for row in rows for cell in row), *heads, *(f"{head}:" for head in heads)}
    assert [line for line in lines if cell_len(line) > width and line.strip() not in alone and set(line) != {"-"}] == []


@pytest.fixture(scope="module")
def results(tmp_path_factory, tiny_tokenizer_folder):
    """What ``bench --json`` printed of a system with a long name."""
    images = [(name, image.resize((32, 32))) for name, image in sample_photos()][:2]
    bench = run_bench({LONG: V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder)}, iter(images), keep=0)
    path = tmp_path_factory.mktemp("results") / "first.json"
    path.write_text(json.dumps(as_record(tables([bench]), [])))
    return path


def test_tables_of_bench(results, width):
    text = v2flow("bench", "join", results).stdout
    rows = [line for line in text.splitlines() if LONG in line and "codes used" not in line]
    assert rows and all(cell_len(line) <= width or line.strip() == LONG for line in rows)
    assert "PSNR" in text and "…" not in text and "..." not in text


def test_the_table_of_a_budget(width, monkeypatch):
    rows = [budgets.StageFigures("a-stage-with-a-name", 1_234_567, 1234.5, 0.123, "held-out loss 1.234", 4567.0)]
    monkeypatch.setattr(budgets, "run_budget", lambda *arguments: rows)
    text = v2flow("budget", ROOT / "recipes" / "default" / "budget.yaml", "--minutes", 5).stdout
    assert all(cell_len(line) <= width for line in text.splitlines())
    for cell in ("a-stage-with-a-name", "1,234,567", "1,234.5", "12.3%", "76.1", "held-out loss 1.234"):
        assert cell in text


@pytest.mark.parametrize("label", ["train", "tokens to photos, guidance 3"])
def test_a_progress_bar(label, width):
    bar = console._bar()
    bar.add_task(label, total=1_000_000, completed=999_999)
    shown = io.StringIO()
    Console(width=width, file=shown, color_system=None).print(bar.get_renderable())
    text = " ".join(shown.getvalue().split())
    assert "999999/1000000" in text and "…" not in text and all(word in text for word in label.split())


def folder_of(tmp_path):
    return tmp_path / "a folder with a name of many words" / "photographs-of-the-summer-of-2024"


@pytest.mark.parametrize(
    "arguments",
    [
        ("encode", "{path}", "-o", "out"),
        ("decode", "{path}", "-o", "out"),
        ("shard", "{path}", "-o", "out"),
        ("train", "{path}/recipe.yaml"),
        ("finetune-llm", "{path}/recipe.yaml"),
        ("budget", "{path}/recipe.yaml", "--minutes", "1"),
        ("generate", "--prompts", "{path}/prompts.txt"),
        ("bench", "{path}"),
        ("bench", "llm", "{path}"),
        ("bench", "draw", "{path}", "--features", "f.safetensors"),
        ("bench", "alignment", "{path}"),
        ("bench", "cost", "{path}/recipe.yaml"),
        ("bench", "join", "{path}/first.json"),
    ],
    ids=lambda a: " ".join(a[:2]),
)
def test_a_message_has_its_path_on_one_line(arguments, tmp_path, width, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = folder_of(tmp_path)
    done = v2flow(*(a.format(path=path) for a in arguments), code=1)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert str(path) in line and done.stdout == "" and "Traceback" not in done.stderr


def in_terminal(columns, *arguments, cwd):
    """stdout and stderr of a command in a terminal of so many columns."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "v2flow_cli", *map(str, arguments)]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=cwd)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += (chunk := os.read(ours, 65_536))
        except OSError:  # how Linux says that the other end is closed
            break
        if not chunk:
            break
    assert process.wait() == 0, shown
    return shown.decode()


def test_a_terminal_of_40_columns_and_a_pipe(results, tmp_path, monkeypatch):
    """In a terminal the table is narrow; the same command into a pipe gives one line a system, of any length."""
    monkeypatch.delenv("COLUMNS", raising=False)
    shown = in_terminal(40, "bench", "join", results, cwd=tmp_path)
    assert f"\n{LONG}\r\n" in shown and "…" not in shown
    piped = subprocess.run(
        [sys.executable, "-m", "v2flow_cli", "bench", "join", results],
        env={k: v for k, v in os.environ.items() if k != "COLUMNS"} | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (row,) = [line for line in piped.splitlines() if line.startswith(f"{LONG}  ")]
    assert len(row) > 100
