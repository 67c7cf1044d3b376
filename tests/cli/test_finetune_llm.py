import json
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from v2flow_cli.cli.app import app


@pytest.fixture
def recipe(request, tmp_path):
    """Arguments of a tiny run from text."""
    (tmp_path / "text.txt").write_text("\n".join(f"a red fox number {i} runs" for i in range(200)))
    path = request.config.rootpath / "recipes/tiny/lm.yaml"
    return [str(path), "--set", f"text=[{tmp_path}/text.txt]", "--set", f"output={tmp_path / 'lm'}"]


def invoke(*arguments):
    return CliRunner().invoke(app, ["finetune-llm", *map(str, arguments)])


def test_prints_one_json_object_and_logs_to_stderr(recipe):
    ran = invoke(*recipe, "--json")
    assert ran.exit_code == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["steps"] == 10 and report["eval_loss"] > 0
    assert "step 10/10" in ran.stderr
    again = invoke(*recipe)
    assert again.exit_code == 1 and "already holds a run (checkpoints/checkpoint-10)" in again.stderr
    resumed = invoke(*recipe, "--resume")
    assert resumed.exit_code == 0 and "resuming from" in resumed.stderr
    assert "10 steps" in resumed.stdout and "nats a token" in resumed.stdout


def test_dry_run_writes_nothing(recipe, tmp_path):
    ran = invoke(*recipe, "--dry-run", "--json")
    assert json.loads(ran.stdout)["parameters"] > 10_000
    assert not (tmp_path / "lm").exists()
    assert "parameters: " in invoke(*recipe, "--dry-run").stdout
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "config.json").write_text("{}")
    taken = invoke(*recipe, "--dry-run")
    assert taken.exit_code == 1 and taken.stdout == "" and "already holds a run (config.json)" in taken.stderr
    assert invoke(*recipe, "--dry-run", "--resume").exit_code == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.hiden_size=3", "did you mean model.hidden_size"),
        ("model.vocab_size=100", "expected at least 259"),
        ("model.num_heads=3", "expected a multiple of 6"),
        ("block_size=4000", "expected 2 to model.max_positions"),
        ("train.accumulate=3", "expected a multiple of train.accumulate"),
        ("text=[nowhere.txt]", "matches no file"),
    ],
)
def test_bad_recipes(recipe, setting, message):
    ran = invoke(*recipe, "--set", setting)
    assert ran.exit_code == 1 and message in ran.stderr and "Traceback" not in ran.output


def test_finetune_recipe_problems(request):
    path = request.config.rootpath / "recipes/tiny/llm.yaml"
    ran = invoke(path, "--set", "mode=lora", "--set", "data.caption_dropout=1.5", "--set", "mode=lorra")
    assert ran.exit_code == 1 and "did you mean lora" in ran.stderr
    ran = invoke(path, "--set", "mode=lora", "--set", "data.caption_dropout=1.5")
    assert "data.caption_dropout is 1.5; expected a share in [0, 1)" in ran.stderr
    ran = invoke(path, "--set", "mode=lora")  # rules between fields are checked if each is in its range
    assert "expected a lora section" in ran.stderr


def test_refuses_recipes_of_train(request):
    ran = invoke(request.config.rootpath / "recipes/default/tokenizer.yaml")
    assert ran.exit_code == 1 and "use `v2flow train`" in ran.stderr


def test_an_output_that_cannot_be_written_is_one_message(tmp_path, recipe):
    (tmp_path / "file").write_text("")
    done = invoke(*recipe, "--set", f"output={tmp_path / 'file' / 'run'}")
    assert done.exit_code == 1 and "cannot be written" in done.stderr


def test_a_signal_saves_and_exits_130(recipe, tmp_path):
    """SIGTERM in the middle of a run: a complete checkpoint without pickles, exit code 130, and --resume continues."""
    command = [sys.executable, "-m", "v2flow_cli.cli.app", "finetune-llm", *recipe, "--set", "train.steps=2000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        for line in run.stderr:
            if line.startswith("step 10/"):
                run.send_signal(signal.SIGTERM)
                break
        tail = run.stderr.read()
    assert run.returncode == 130 and "continue with --resume" in tail
    (checkpoint,) = (tmp_path / "lm/checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 10 <= step < 2000
    kinds = {path.suffix for path in checkpoint.iterdir()}
    assert kinds == {".safetensors", ".json"}
    resumed = invoke(*recipe, "--set", "train.steps=2000", "--set", "train.max_minutes=0.0001", "--resume")
    assert resumed.exit_code == 0 and f"{checkpoint}" in resumed.stderr and f"{step} steps" in resumed.stdout
