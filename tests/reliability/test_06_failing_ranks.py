"""6. A loss that is not finite, bad data or a killed process on one rank stops both within a minute, by name."""

import json
import os
import signal
import time

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.reliability.processes import ranks, wait
from v2flow_cli.recipe import load_recipe
from v2flow_cli.training import loop as module
from v2flow_cli.training.objectives.autoencoder import AutoencoderObjective

from ..conftest import RECIPES

MINUTE = 60.0


@pytest.fixture
def launch(tmp_path, sample_images):
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(sample_images):
        image.resize((40, 36)).save(tmp_path / "photos" / f"{i}.png")

    def run(happen, *more):
        """Two ranks, ``happen(step)`` before each forward pass of rank 1; (codes, their errors, seconds)."""
        changes = [f"data.sources=[{tmp_path / 'photos'}]", "data.crop_size=16", f"output={tmp_path / 'run'}", *more]
        recipe = load_recipe(RECIPES / "tiny" / "autoencoder.yaml", changes)

        class Objective(AutoencoderObjective):
            def forward(self, images, step):
                terms = super().forward(images, step)
                if os.environ["RANK"] == "1" and happen(step):
                    terms["loss"] = terms["loss"] * torch.nan
                    self.latent_mean.fill_(torch.nan)
                return terms

        def train():
            AcceleratorState._reset_state(True)
            module.build_objective = Objective
            module.train(recipe, resume=True, log=lambda message: None)

        for old in tmp_path.glob("?.txt"):
            old.unlink()
        start = time.monotonic()
        codes = wait(ranks(train, 2, errors=tmp_path), 2 * MINUTE)
        return codes, [p.read_text() for p in sorted(tmp_path.glob("?.txt"))], time.monotonic() - start

    return run


def test_one_rank_fed_a_nan(launch):
    codes, errors, seconds = launch(lambda step: step == 2)
    assert codes == [1, 1] and seconds < MINUTE
    assert errors[0] == errors[1]  # both name the rank where it happened
    assert "SharedError: step 2, rank 1: the loss is not finite (nan) on samples " in errors[0]


def test_skipped_steps_are_skipped_by_all_and_leave_no_trace(launch, tmp_path):
    bad = []

    def once(step):
        bad.append(step)
        return step == 2 and bad.count(2) == 1

    assert launch(once, "train.skip_bad_steps=1")[:2] == ([0, 0], [])
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000006" / "state.json").read_text())["state"]
    assert state["train_state"]["bad_steps"] == 1 and state["train_state"]["images_seen"] == 24
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["shift_factor"] == config["shift_factor"]  # the statistics did not keep the NaN


def test_more_bad_steps_than_allowed(launch):
    codes, errors, _ = launch(lambda step: step == 2, "train.skip_bad_steps=2")
    assert codes == [1, 1] and "not finite" in errors[0]


def test_one_rank_killed(launch):
    codes, errors, seconds = launch(lambda step: step == 2 and os.kill(os.getpid(), signal.SIGKILL))
    assert codes == [1, -signal.SIGKILL] and seconds < MINUTE
    assert "V2FlowError: step 2, rank 0 on samples" in errors[0] and "lost contact with another process" in errors[0]


def test_one_rank_without_data(launch, tmp_path):
    def vanish(step):
        if step == 1:
            for photo in (tmp_path / "photos").iterdir():
                photo.unlink()

    codes, errors, seconds = launch(vanish)
    assert codes == [1, 1] and seconds < MINUTE
    assert all("cannot be read" in error for error in errors)
