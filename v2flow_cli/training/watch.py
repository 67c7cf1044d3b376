"""Accelerate's trackers, and image grids of the same crops at the same seeds, beside the log of a run."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from PIL import Image
from torch import Tensor

from v2flow_cli.errors import V2FlowError
from v2flow_cli.recipe.schema import ImageData
from v2flow_cli.runtime.processes import on_every_rank
from v2flow_cli.store.files import write_bytes
from v2flow_cli.store.images import png_bytes
from v2flow_cli.tokenizer.preprocess import to_uint8
from v2flow_cli.training.crops import crop_loader
from v2flow_cli.training.objectives.objective import Objective

GRID_IMAGES = 8
PROJECT = "v2flow"


def tracker_options(tracker: str, folder: Path) -> dict[str, Any]:
    """Keyword arguments of ``Accelerator`` for the recipe's ``train.tracker``.

    Raises:  V2FlowError for a named tracker that is not installed.
    """
    installed = {
        "tensorboard": any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")),
        "wandb": importlib.util.find_spec("wandb") is not None,
    }
    if tracker == "none":
        return {}
    if tracker == "auto":  # W&B sends figures to a server, so it also needs a key
        enabled = {"tensorboard": True, "wandb": bool({"WANDB_API_KEY", "WANDB_MODE"} & os.environ.keys())}
        names = [name for name in installed if installed[name] and enabled[name]]
    elif installed[tracker]:
        names = [tracker]
    else:
        raise V2FlowError(
            f"train.tracker is {tracker}, which is not installed: pip install {tracker}, or set it to none."
        )
    if not names:
        return {}
    return {"log_with": names, "project_config": ProjectConfiguration(str(folder), str(folder / "trackers"))}


class Watch:
    """Trackers and image grids of one run, in the first process only."""

    def __init__(self, accelerator: Accelerator, folder: Path, recipe_text: str, data: ImageData, seed: int) -> None:
        self._accelerator, self._folder = accelerator, folder
        self._data, self._seed = data, seed
        self._images: Tensor | None = None  # read for the first grid
        if accelerator.log_with:
            accelerator.init_trackers(PROJECT, config={"recipe": recipe_text})

    def figures(self, record: Mapping[str, float]) -> None:
        """Send one line of metrics.jsonl to the trackers."""
        values = {name: value for name, value in record.items() if name != "step"}
        self._accelerator.log(values, step=int(record["step"]))

    def grid(self, objective: Objective, step: int) -> None:
        """Write ``grids/step-NNNNNNNN.png``: crops above their reconstructions (not by the average)."""
        draw = functools.partial(self._draw, objective, step)
        on_every_rank(draw if self._accelerator.is_main_process else lambda: None, self._accelerator.device)

    def _draw(self, objective: Objective, step: int) -> None:
        images = self._crops()
        objective.train(False)
        with torch.no_grad(), self._accelerator.autocast():
            reconstructions = objective.reconstruct(images.to(self._accelerator.device))
        objective.train(True)
        rows = [np.concatenate(list(to_uint8(part).numpy()), axis=1) for part in (images, reconstructions)]
        pixels = np.concatenate(rows, axis=0)  # (2 S, 8 S, 3)
        write_bytes(self._folder / "grids" / f"step-{step:08d}.png", png_bytes(Image.fromarray(pixels)))
        for tracker in self._accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"crops above reconstructions": pixels[None]}, step=step, **layout)

    def _crops(self) -> Tensor:
        """The first crops of the run's data (8, 3, S, S), always square, and the same at every step."""
        if self._images is None:
            data = dataclasses.replace(self._data, workers=0, aspects=())
            output = str(self._folder)
            crops = crop_loader(data, GRID_IMAGES, seed=self._seed, start=0, rank=0, world_size=1, output=output)
            batch = next(iter(crops))
            if isinstance(batch, V2FlowError):
                raise batch
            self._images = batch.images
        return self._images
