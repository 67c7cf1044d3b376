"""Trackers and picture grids."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from v2flow_cli.errors import V2FlowError
from v2flow_cli.recipe.schema import ImageData
from v2flow_cli.training import watch
from v2flow_cli.training.watch import Watch, tracker_options


class Darker(torch.nn.Module):
    """A stand-in for an objective: half as bright."""

    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return images / 2 - 0.5


@pytest.fixture
def data(tmp_path: Path, sample_images) -> ImageData:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, image in enumerate(sample_images):
        image.resize((48, 40)).save(folder / f"{i}.png")
    return ImageData((str(folder),), 32, 0.5, True, workers=1)


def test_grids_show_the_same_crops_above_their_reconstructions(data: ImageData, tmp_path: Path) -> None:
    def draw(folder: str, step: int) -> np.ndarray:
        objective = Darker()
        Watch(Accelerator(cpu=True), tmp_path / folder, "recipe", data, seed=3).grid(objective, step)
        assert objective.training
        return np.asarray(Image.open(tmp_path / folder / "grids" / f"step-{step:08d}.png")).astype(int)

    first = draw("a", 20)
    assert first.shape == (64, 8 * 32, 3)
    assert np.abs(first[:32] // 2 - first[32:]).max() <= 1
    assert np.array_equal(draw("b", 40), first)


def test_trackers_get_figures_and_grids(data: ImageData, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = Accelerator(cpu=True, **tracker_options("tensorboard", tmp_path))
    seen = Watch(accelerator, tmp_path, "recipe: text", data, seed=0)
    for step, loss in ((20, 2.0), (40, 1.0)):
        seen.figures({"step": step, "train/loss": loss})
    seen.grid(Darker(), 40)
    accelerator.end_training()
    [folder] = {file.parent for file in (tmp_path / "trackers" / "v2flow").glob("events*")}
    events = EventAccumulator(str(folder)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(20, 2.0), (40, 1.0)]
    assert events.Tags()["images"] == ["crops above reconstructions"]


def test_which_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    installed = {"tensorboard", "wandb"}
    monkeypatch.setattr(watch.importlib.util, "find_spec", lambda name: object() if name in installed else None)
    assert tracker_options("none", tmp_path) == {}
    assert tracker_options("auto", tmp_path)["log_with"] == ["tensorboard"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tracker_options("auto", tmp_path)["log_with"] == ["tensorboard", "wandb"]
    installed.clear()
    assert tracker_options("auto", tmp_path) == {}
    with pytest.raises(V2FlowError, match=r"train.tracker is wandb, which is not installed: pip install wandb"):
        tracker_options("wandb", tmp_path)
