"""Golden losses: three tiny steps on a CPU. A change of these numbers is a change of what training computes."""

import json

import pytest

from v2flow_cli.training.loop import train

from .conftest import quiet, recipe

# Where such a change is meant, the new losses are those that this test prints.
GOLDEN = {
    "autoencoder": [0.486116, 0.497923, 0.287683],
    "tokenizer": [2.815736, 1.426485, 1.214121],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_losses_of_three_steps(world, tmp_path, name):
    made = recipe(world, name, tmp_path / name, "train.steps=3", "train.log_every=1", "optimizer.warmup_steps=0")
    train(made, resume=False, log=quiet)
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["train/loss"] for line in lines]
    assert losses == pytest.approx(GOLDEN[name], rel=2e-3)
