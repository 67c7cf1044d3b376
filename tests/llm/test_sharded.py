"""finetune-llm under FSDP 2 and DeepSpeed: two CPU processes, set up by ``sharded_launch``."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from v2flow_cli.recipe.load import dump_recipe

pytestmark = pytest.mark.slow

ENGINES = {
    "fsdp-sharded": ("fsdp", {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}),
    "fsdp-full": ("fsdp", {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}),
    "deepspeed-1": ("deepspeed", {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}),
    "deepspeed-2": ("deepspeed", {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
}


@pytest.fixture(params=ENGINES)
def launch(request, recipe, tmp_path):
    """The function ``launch(**train_settings)`` that starts or resumes the recipe; the finished process."""
    engine, settings = ENGINES[request.param]
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")

    def run(**train_settings):
        changed = replace(recipe, train=replace(recipe.train, **train_settings))
        (tmp_path / "recipe.yaml").write_text(dump_recipe(changed))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = ["finetune-llm", str(tmp_path / "recipe.yaml"), "--resume", "--json"]
        return subprocess.run(
            [*torchrun, "-m", "tests.llm.sharded_launch", engine, *command],
            capture_output=True,
            text=True,
            env={**os.environ, **settings, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            cwd=request.config.rootpath,
            timeout=900,
        )

    run.engine = engine
    return run


def final_state(output):
    """The weights of the plain folder, and what is logged in the last checkpoint."""
    state = json.loads((output / "checkpoints/checkpoint-4/trainer_state.json").read_text())
    clocks = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    log = [{k: v for k, v in line.items() if k not in clocks} for line in state["log_history"]]
    return AutoModelForCausalLM.from_pretrained(output).state_dict(), log


def test_resume_equals_not_stopping(launch, recipe):
    settings = dict(steps=4, save_every=2, log_every=3, keep_checkpoints=2)
    output = Path(recipe.output)
    found = []
    for lost in ((), ("checkpoint-4",), ()):  # from the start, from step 2, and when all steps are done
        for name in lost:
            shutil.rmtree(output / "checkpoints" / name)
        for path in output.glob("*.*"):
            path.unlink()
        done = launch(**settings)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(final_state(output))
    (weights, log), *resumed = found
    assert [line["step"] for line in log] == [3, 4]
    for other_weights, other_log in resumed:
        assert other_log == log and other_weights.keys() == weights.keys()
        assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_skip_bad_steps_is_refused_with_deepspeed(launch):
    if launch.engine != "deepspeed":
        pytest.skip("FSDP can skip")
    done = launch(skip_bad_steps=1)
    assert done.returncode == 1 and "train.skip_bad_steps is 1; DeepSpeed changes the weights before" in done.stderr
