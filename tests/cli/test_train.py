import json

import pytest
from typer.testing import CliRunner

from v2flow_cli.cli.app import app
from v2flow_cli.recipe import load_recipe

from ..conftest import RECIPES


def v2flow(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_dry_run_reports_sizes_and_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = v2flow("train", RECIPES / "tiny" / "autoencoder.yaml", "--dry-run", "--json")
    report = json.loads(done.stdout)
    assert done.exit_code == 0 and report["parameters"] > 1000 and report["images"] == 24
    assert list(tmp_path.iterdir()) == []


def test_dry_run_says_which_earlier_stage_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = v2flow("train", RECIPES / "tiny" / "tokenizer.yaml", "--dry-run", "--json")
    report = json.loads(done.stdout)
    assert len(report["missing"]) == 2 and report["tokens_per_image"] > 0


@pytest.mark.parametrize(
    "arguments,expected",
    [
        (["nowhere.yaml"], "nowhere.yaml: no such recipe"),
        ([RECIPES / "tiny" / "lm.yaml"], "use `v2flow finetune-llm`"),
        ([RECIPES / "tiny" / "autoencoder.yaml", "--set", "train.stpes=3"], "did you mean train.steps?"),
        ([RECIPES / "tiny" / "autoencoder.yaml", "--set", "data.sources=[nowhere]"], "nowhere"),
        ([RECIPES / "tiny" / "tokenizer.yaml"], "runs/tiny/autoencoder: not an autoencoder folder"),
    ],
)
def test_bad_input_is_one_message(tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    done = v2flow("train", *arguments)
    assert done.exit_code == 1
    assert expected in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_an_output_that_cannot_be_written_is_one_message(tmp_path, monkeypatch, sample_images):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    sample_images[0].resize((96, 80)).save(tmp_path / "photos" / "a.png")
    (tmp_path / "file").write_text("")
    done = v2flow("train", RECIPES / "tiny" / "autoencoder.yaml", "--set", "output=file/run")
    assert done.exit_code == 1 and "file/run/recipe.yaml: cannot be written" in done.stderr


def recipes():
    """Every recipe of ``v2flow train``; the paper's take seconds each, so all but one are for the slow suite."""
    for path in sorted(RECIPES.rglob("*.yaml")):
        if load_recipe(path).kind in ("autoencoder", "tokenizer"):
            slow = path.parent.name == "paper" and path.stem != "base"
            name = f"{path.parent.name}/{path.stem}"
            yield pytest.param(path, id=name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("path", list(recipes()))
def test_every_recipe_is_planned_without_a_network(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = v2flow("train", path, "--dry-run", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["peak_with_one_image_bytes"] > report["one_image_bytes"] > 0
    if path.parent.name == "paper":
        assert "missing" not in report
        assert report["tokens_per_image"] == {"tokens-64": 64, "tokens-128": 128, "512px-1024": 1024}.get(
            path.stem, 256
        )
