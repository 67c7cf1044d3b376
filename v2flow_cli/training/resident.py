"""Photos that are decoded once and stay on the device as 8-bit squares; crops and flips are computed there.

Two CPU cores decode some hundred photos a second, but a GPU trains on ten thousand. Batch b does not depend on resumes:
its photos come from a permutation per epoch, its crops from the seed and the number of the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from v2flow_cli.errors import V2FlowError
from v2flow_cli.recipe.schema import ImageData
from v2flow_cli.runtime.device import cpu_cores
from v2flow_cli.runtime.processes import on_every_rank
from v2flow_cli.store.failures import Failure
from v2flow_cli.training.crops import CropBatch, first_crops, shuffled_rows

LOADED_AT_ONCE = 64  # photos


class ResidentPhotos:
    """``pixels`` (N, R, R, 3), 8-bit, on the device; else as ``CropBatch``."""

    def __init__(self, pixels: Tensor, keys: list[str], failures: list[Failure], total: int) -> None:
        self.pixels, self.keys, self.failures, self.total = pixels, keys, failures, total

    def batches(self, data: ImageData, batch_size: int, *, seed: int, rank: int, start: int) -> Iterator[CropBatch]:
        """Endless batches of random crops, from batch ``start`` on."""
        device, number = self.pixels.device, start
        for rows in shuffled_rows(len(self.keys), batch_size, seed=seed, start=start):
            rng = np.random.default_rng([seed, rank, number])
            # One small copy: row numbers are exact in float64.
            numbers = torch.from_numpy(np.concatenate([rows[None].astype(float), rng.random((4, batch_size))]))
            if device.type == "cuda":
                numbers = numbers.pin_memory()
            numbers = numbers.to(device, non_blocking=True)
            crops = random_crops(self.pixels.index_select(0, numbers[0].long()), data, numbers[1:])
            yield CropBatch(crops, [self.keys[row] for row in rows], self.failures, self.total)
            self.failures, number = [], number + 1


def random_crops(photos: Tensor, data: ImageData, u: Tensor) -> Tensor:
    """Square crops (B, S, S, 3), 8-bit, of square photos (B, R, R, 3): bicubic, without a low-pass filter.

    Args:  u (4, B), uniform in [0, 1): the side between ``min_scale`` and ``max_scale`` of R, the left and the top
           edge, and whether the crop is mirrored.
    """
    share = data.min_scale + (data.max_scale - data.min_scale) * u[0]
    left, top = (1 - share) * u[1], (1 - share) * u[2]  # shares of R
    mirrored = torch.where(u[3] < (0.5 if data.horizontal_flip else 0.0), -1.0, 1.0)
    zero = torch.zeros_like(share)
    across = torch.stack([mirrored * share, zero, 2 * left + share - 1], -1)
    down = torch.stack([zero, share, 2 * top + share - 1], -1)
    size = (len(photos), 3, data.crop_size, data.crop_size)
    grid = F.affine_grid(torch.stack([across, down], 1).float(), list(size), align_corners=False)
    images = photos.movedim(-1, 1).float()
    crops = F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return crops.round().clamp(0, 255).to(torch.uint8).movedim(1, -1)


def load_resident(
    data: ImageData, *, seed: int, rank: int, ranks: int, device: torch.device, output: str | None = None
) -> ResidentPhotos:
    """This rank's photos as squares of ``data.resident_px``, decoded by all cores unless ``data.workers`` is 0.

    Raises:  V2FlowError if they do not fit into the device's memory, and the errors of the stream.
    """
    side = data.resident_px
    workers = max(data.workers, cpu_cores()) if data.workers else 0
    # The largest square at a random position along the longer side.
    squares = dataclasses.replace(
        data, crop_size=side, min_scale=1.0, max_scale=1.0, horizontal_flip=False, workers=workers
    )
    pixels, keys = torch.zeros(0), list[str]()
    failures: dict[Failure, None] = {}
    total = 0
    for batch in first_crops(squares, LOADED_AT_ONCE, seed=seed, rank=rank, world_size=ranks, output=output):
        if not keys:
            total = batch.total
            pixels = _allocate(max(1, total // ranks), side, device)
        pixels[len(keys) : len(keys) + len(batch.keys)].copy_(batch.pixels, non_blocking=True)
        keys.extend(batch.keys)
        failures.update(dict.fromkeys(batch.failures))
    return ResidentPhotos(pixels, keys, list(failures), total)


def _allocate(count: int, side: int, device: torch.device) -> Tensor:
    try:
        return torch.empty(count, side, side, 3, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # also torch.OutOfMemoryError; the CPU's allocator raises RuntimeError
        gigabytes = count * side * side * 3 / 1e9
        raise V2FlowError(
            f"data.resident_px is {side}: {count:,} photos need {gigabytes:.1f} GB, more than {device} has free "
            f"({str(error).splitlines()[0]}). Lower it, or set it to 0 to read the photos at each step."
        ) from None


def resident_batches(
    accelerator: Accelerator,
    data: ImageData,
    batch_size: int,
    seed: int,
    start: int,
    log: Callable[[str], None],
    output: str | None = None,
) -> Iterator[CropBatch]:
    """This rank's batches from batch ``start`` on.  Raises: SharedError, on every rank, if one has no photos."""
    rank, ranks, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    where: dict[str, Any] = dict(rank=rank, ranks=ranks, device=device, output=output)
    photos = on_every_rank(lambda: load_resident(data, seed=seed, **where), device)
    log(f"{len(photos.keys):,} photos a rank stay on {device}, {photos.pixels.numel() / 1e9:.2f} GB")
    return photos.batches(data, batch_size, seed=seed, rank=rank, start=start)
