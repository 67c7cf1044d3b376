"""Training crops in a fixed order: batch b is the same whatever the workers, and whenever a run resumes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from v2flow_cli.recipe.schema import ImageData
from v2flow_cli.store.images import open_image
from v2flow_cli.store.stream import SampleStream
from v2flow_cli.tokenizer.preprocess import crop_to_tensor


@dataclass(frozen=True)
class CropBatch:
    """``images`` (B, 3, S, S) in [-1, 1] and the ``keys`` of the photos they come from."""

    images: Tensor
    keys: list[str]


class CropBatches(IterableDataset[CropBatch]):
    """Endless batches of random square crops; loader worker w of W makes batches w, w + W, ... after ``start``."""

    def __init__(
        self, data: ImageData, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.data, self.batch_size, self.seed, self.start = data, batch_size, seed, start
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[CropBatch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        stream = SampleStream(
            self.data.sources,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
            shuffle_shards=self.data.shuffle_shards,
        )
        first = self.start * self.batch_size
        crops: list[Tensor] = []
        keys: list[str] = []
        for ordinal, sample in enumerate(stream.samples(first), start=first):
            if (ordinal // self.batch_size - self.start) % workers != worker:
                continue  # another worker's batch; its bytes are cheap beside decoding them
            rng = random.Random(f"{self.seed}/{self.rank}/{ordinal}")
            crops.append(random_crop(open_image(sample.image, name=sample.source), self.data, rng))
            keys.append(sample.key)
            if len(crops) == self.batch_size:
                yield CropBatch(torch.stack(crops), keys)
                crops, keys = [], []


def random_crop(image: Image.Image, data: ImageData, rng: random.Random) -> Tensor:
    """A square crop (3, S, S): side drawn uniformly in [min_scale, max_scale] of the photo's short side."""
    width, height = image.size
    side = max(1.0, min(width, height) * rng.uniform(data.min_scale, data.max_scale))
    left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
    crop = crop_to_tensor(image, (left, top, left + side, top + side), data.crop_size)
    return crop.flip(-1) if data.horizontal_flip and rng.random() < 0.5 else crop


def crop_loader(
    data: ImageData, batch_size: int, *, seed: int, start: int, rank: int, world_size: int
) -> DataLoader[CropBatch]:
    """A loader of ``CropBatches`` from batch ``start`` on."""
    batches = CropBatches(data, batch_size, seed=seed, start=start, rank=rank, world_size=world_size)
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=data.workers,
        prefetch_factor=4 if data.workers else None,
        multiprocessing_context="spawn" if data.workers else None,
        persistent_workers=False,
    )
