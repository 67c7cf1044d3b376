"""3. Training killed with SIGKILL at any moment and resumed ends as if nothing had happened, bit for bit."""

import json
import os
import random
import signal
import time
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from tests.reliability.processes import fork, wait
from v2flow_cli.recipe import load_recipe
from v2flow_cli.train.loop import train

from ..conftest import RECIPES

CLOCKS = ("images_per_second", "data_wait_share", "seconds", "peak_gib")  # of the machine, not of the training


@pytest.fixture
def recipe(tmp_path, sample_images):
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(sample_images):
        image.resize((40, 36)).save(tmp_path / "photos" / f"{i}.png")

    def make(output):
        changes = [f"data.sources=[{tmp_path / 'photos'}]", "data.crop_size=16", f"output={tmp_path / output}"]
        more = ["train.steps=12", "train.save_every=3", "train.log_every=4", "train.batch_size=2"]
        return load_recipe(RECIPES / "tiny" / "autoencoder.yaml", [*changes, *more])

    return make


def run(recipe):
    AcceleratorState._reset_state(True)
    train(recipe, resume=True, log=lambda message: None)


def final_state(folder):
    """Everything that a run leaves, but for clocks: the model, weights, average and optimizer, and the log."""
    newest = max((folder / "checkpoints").glob("step-*"))
    tensors = {f"{f.name}/{k}": v for f in newest.glob("*.safetensors") for k, v in load_file(f).items()}
    tensors |= {f"exported/{k}": v for k, v in load_file(folder / "model.safetensors").items()}
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return newest.name, tensors, [{k: v for k, v in line.items() if k not in CLOCKS} for line in log]


@pytest.mark.parametrize("kills", [pytest.param(3, id="3"), pytest.param(30, id="30", marks=pytest.mark.slow)])
def test_killed_and_resumed(recipe, tmp_path, kills):
    start = time.monotonic()
    assert wait([fork(lambda: run(recipe("whole")))], 120) == [0]
    seconds = time.monotonic() - start
    name, tensors, log = final_state(tmp_path / "whole")
    assert name == "step-00000012" and [line["step"] for line in log] == [4, 8, 12]
    rng, killed, output = random.Random(0), 0, 0
    while killed < kills:  # each output is killed up to five times, then left to end
        for _ in range(min(5, kills - killed)):
            pid = fork(partial(run, recipe(str(output))))
            time.sleep(rng.uniform(0.0, 1.1 * seconds))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            killed += 1
        assert wait([fork(partial(run, recipe(str(output))))], 120) == [0]
        found = final_state(tmp_path / str(output))
        assert found[0] == name and found[2] == log
        assert found[1].keys() == tensors.keys() and all(torch.equal(tensors[k], v) for k, v in found[1].items())
        output += 1
