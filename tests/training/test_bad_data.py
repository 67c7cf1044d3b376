"""Bad photos and dead loaders in training: passed over within the budget, listed, or one sentence."""

import json

import pytest
import torch

from v2flow_cli.errors import ModelError, V2FlowError
from v2flow_cli.training import loop as module
from v2flow_cli.training.loop import _next, train

from .conftest import quiet, recipe


@pytest.fixture
def spoiled(world, tmp_path):
    """The photos of ``world``, one of them cut."""
    for photo in (world / "photos").iterdir():
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / photo.name).write_bytes(photo.read_bytes())
    bad = tmp_path / "photos" / photo.name
    bad.write_bytes(bad.read_bytes()[:200])
    return bad


def test_a_bad_photo_is_listed_once_and_replaced(world, tmp_path, spoiled):
    more = [f"data.sources=[{spoiled.parent}]", "data.error_budget=0.5", "train.steps=5"]
    made = recipe(world, "autoencoder", tmp_path / "a", *more)
    assert train(made, resume=False, log=quiet).images == 20
    (line,) = (tmp_path / "a" / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line)["source"] == str(spoiled) and "image" in json.loads(line)["reason"]


def test_more_bad_photos_than_the_budget_stop_the_run(world, tmp_path, spoiled):
    made = recipe(world, "autoencoder", tmp_path / "a", f"data.sources=[{spoiled.parent}]", "train.steps=5")
    with pytest.raises(V2FlowError, match=r"exceeds the error budget of 0\.10% of the samples"):
        train(made, resume=False, log=quiet)


def test_a_killed_loader_is_an_error():
    def batches():
        raise RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly\nmore")
        yield

    _, problem = _next(batches(), 1)
    assert problem.startswith("DataLoader worker (pid(s) 12) exited unexpectedly") and "--resume" in problem


def test_other_ranks_are_refused_or_approximate(world, tmp_path):
    made = recipe(world, "autoencoder", tmp_path / "a", "train.steps=4", "train.save_every=2")
    train(made, resume=False, log=quiet)
    for state in (tmp_path / "a" / "checkpoints").glob("*/state.json"):
        record = json.loads(state.read_text())
        record["state"]["ranks"] = 2
        state.write_text(json.dumps(record))
    with pytest.raises(ModelError, match=r"saved by 2 processes, resumed by 1.*--approximate"):
        train(made, resume=True, log=quiet)
    lines: list[str] = []
    train(made, resume=True, log=lines.append, approximate=True)
    assert any("approximate resume: 2 processes before, 1 now" in line for line in lines)


def test_a_skipped_step_restores_the_buffers(world, tmp_path, monkeypatch):
    made = recipe(world, "autoencoder", tmp_path / "a", "train.steps=3", "train.skip_bad_steps=1")
    calls = []

    class Objective(module.AutoencoderObjective):
        def forward(self, images, step):
            terms = super().forward(images, step)
            calls.append(step)
            if calls == [0, 1]:
                self.latent_mean.fill_(torch.nan)
                terms["loss"] = terms["loss"] * torch.inf
            return terms

    monkeypatch.setattr(module, "build_objective", Objective)
    assert train(made, resume=False, log=quiet).steps == 3 and calls == [0, 1, 1, 2]
    assert json.loads((tmp_path / "a" / "config.json").read_text())["shift_factor"] == pytest.approx(0, abs=10)
