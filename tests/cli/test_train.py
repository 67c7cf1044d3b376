import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from v2flow_cli.cli.app import app
from v2flow_cli.recipe import load_recipe

from ..conftest import RECIPES, STAGES


def v2flow(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_dry_run_reports_sizes_and_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    data = ["--set", "data.sources=[.]"]
    done = v2flow("train", RECIPES / "tiny" / "autoencoder.yaml", *data, "--dry-run", "--json")
    report = json.loads(done.stdout)
    assert done.exit_code == 0 and report["parameters"] > 1000 and report["images"] == 24
    assert "missing" not in report
    assert list(tmp_path.iterdir()) == [tmp_path / "a.png"]


def test_dry_run_reports_a_missing_earlier_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = v2flow("train", RECIPES / "tiny" / "tokenizer.yaml", "--dry-run", "--json")
    report = json.loads(done.stdout)
    assert done.exit_code == 1 and "would not start; 3 reason(s) above" in done.stderr
    assert report["tokens_per_image"] > 0
    for name, reason in zip(("runs/tiny/autoencoder", "runs/tiny/lm", "photos"), report["missing"]):
        assert name in reason and f"missing: {reason}" in done.stderr


@pytest.mark.parametrize("options", [[], ["--resume"]])
def test_dry_run_checks_the_output(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "run" / "checkpoints" / "step-00000002").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    dry = ["train", RECIPES / "tiny" / "autoencoder.yaml", "--set", "data.sources=[a.png]", "--dry-run", *options]
    taken = v2flow(*dry, "--set", "output=run")
    assert taken.exit_code == (0 if options else 1)
    assert options or "output run: already holds a run (checkpoints/step-00000002)" in taken.stderr
    below = v2flow(*dry, "--set", "output=file/run")
    assert below.exit_code == 1 and "output file/run: cannot be written" in below.stderr


def test_dry_run_checks_init_from(tmp_path, monkeypatch, tiny_tokenizer_folder):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    dry = ["train", RECIPES / "tiny" / "tokenizer.yaml", "--set", "data.sources=[a.png]", "--dry-run"]
    dry += ["--set", f"latents.autoencoder={tiny_tokenizer_folder}", "--set", "vocabulary.llm=none"]
    near = tiny_tokenizer_folder.with_name("tokeniser")
    typo = v2flow(*dry, "--set", f"init_from={near}")
    assert typo.exit_code == 1
    assert f"{near}: no such folder. Did you mean {tiny_tokenizer_folder}?" in typo.stderr
    same = ["--set", f"init_from={tiny_tokenizer_folder}"]
    assert v2flow(*dry, *same).exit_code == 0
    other = v2flow(*dry, *same, "--set", "quantizer.codebook_size=32")
    assert other.exit_code == 1 and "but the recipe says" in other.stderr


@pytest.mark.parametrize(
    "arguments,expected",
    [
        (["nowhere.yaml"], "nowhere.yaml: no such recipe"),
        ([RECIPES / "tiny" / "lm.yaml"], "use `v2flow finetune-llm`"),
        ([RECIPES / "tiny" / "autoencoder.yaml", "--set", "train.stpes=3"], "did you mean train.steps?"),
        ([RECIPES / "tiny" / "autoencoder.yaml", "--set", "data.sources=[nowhere]"], "nowhere"),
        ([RECIPES / "tiny" / "tokenizer.yaml"], "runs/tiny/autoencoder: no such folder"),
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
    assert done.exit_code == 1 and "output file/run: cannot be written" in done.stderr


def recipes():
    """Every recipe of ``v2flow train``; the paper's take seconds each, so all but one are for the slow suite."""
    for path in STAGES:
        if load_recipe(path).kind in ("autoencoder", "tokenizer"):
            slow = path.parent.name == "paper" and path.stem != "base"
            name = f"{path.parent.name}/{path.stem}"
            yield pytest.param(path, id=name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("path", list(recipes()))
def test_every_recipe_is_planned_without_a_network(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = v2flow("train", path, "--dry-run", "--json")
    report = json.loads(done.stdout)
    # Its photos are not here, nor are the earlier stages of a recipe in several; the sizes are stated all the same.
    assert done.exit_code == 1 and all("no such f" in reason for reason in report["missing"]), done.stderr
    assert report["peak_with_one_image_bytes"] > report["one_image_bytes"] > 0
    if path.parent.name == "paper":
        assert len(report["missing"]) == 1  # the models are well known
        assert report["tokens_per_image"] == {"tokens-64": 64, "tokens-128": 128, "512px-1024": 1024}.get(
            path.stem, 256
        )
