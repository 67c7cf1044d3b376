"""The tutorial, each command as on its page."""

import re
import shlex
import shutil
from pathlib import Path

from PIL import Image
from typer.testing import CliRunner

from v2flow_cli.cli.app import app

ROOT = Path(__file__).resolve().parents[1]


def commands_of(page: str) -> list[list[str]]:
    lines = re.findall(r"^    v2flow (.+)$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.M)
    return [shlex.split(line) for line in lines]


def test_every_command_of_the_tutorial_runs(tmp_path: Path, sample_images, monkeypatch) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(sample_images[:2]):
        image.resize((320, 280)).save(tmp_path / "photos" / f"{i}.jpg")
        (tmp_path / "photos" / f"{i}.txt").write_text(f"photo number {i}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    commands = commands_of("tutorial.md")
    assert len(commands) > 10
    for arguments in commands:
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{arguments}: {done.stderr}\n{done.exception!r}"
    for made in ("decoded/0.png", "decoded-guided/1.png", "generated/a-red-fox-t0.9-s0.png"):
        assert Image.open(made).size == (256, 256)
    assert Path("bench.html").is_file() and Path("runs/tiny/llm/model.safetensors").is_file()
    [drawn] = Path("generated-tiny").glob("*.png")
    assert Image.open(drawn).size == (64, 64)
