"""Mistakes of the official code (docs/paper.md) that this training must not have."""

import os
import subprocess
import sys

import pytest
import torch

from v2flow_cli.recipe import dump_recipe
from v2flow_cli.training.loop import build_objective

from .conftest import recipe

ONE_RANK_FAILS = """
import os, sys
from v2flow_cli.cli.app import main
from v2flow_cli.training.objectives.autoencoder import AutoencoderObjective

forward = AutoencoderObjective.forward

def broken(self, images, step):
    terms = forward(self, images, step)
    if os.environ["RANK"] == "1" and step == 1:
        terms["loss"] = terms["loss"] * float("nan")
    return terms

AutoencoderObjective.forward = broken
sys.argv = ["v2flow", "train", sys.argv[1]]
main()
"""


def test_training_and_encoding_see_the_same_latents(world, tmp_path):
    objective = build_objective(recipe(world, "tokenizer", tmp_path))
    model, seen = objective.model, []
    model.resampler.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    objective(images, 5)
    model.encode(images)
    raw = model.latents.autoencoder.encode(images)
    assert torch.allclose(seen[0], seen[1], atol=1e-6) and torch.allclose(seen[0], 2.0 * raw, atol=1e-5)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_stops_all(world, tmp_path):
    (tmp_path / "run.py").write_text(ONE_RANK_FAILS)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe(world, "autoencoder", tmp_path / "two")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29518"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(tmp_path / "run.py"), str(tmp_path / "recipe.yaml")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,  # hanging is what this is about
    )
    assert done.returncode != 0 and "the loss is not finite" in done.stderr
    assert not (tmp_path / "two" / "model.safetensors").exists()
