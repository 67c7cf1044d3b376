"""Training crops in a fixed order: batch b is the same whatever the workers, and whenever a run resumes."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from v2flow_cli.errors import DataError, V2FlowError
from v2flow_cli.recipe.schema import ImageData
from v2flow_cli.store.failures import Failure
from v2flow_cli.store.images import open_image
from v2flow_cli.store.stream import Sample, SampleRef, SampleStream
from v2flow_cli.tokenizer.preprocess import crop_to_tensor

TRIES = 16  # samples in a row that may be bad before a batch is given up


@dataclass(frozen=True)
class CropBatch:
    """``images`` (B, 3, S, S) in [-1, 1], the ``keys`` of the photos they come from, and bad ones passed over.

    total: samples in the set; failures: bad ones met while this batch was made.
    """

    images: Tensor
    keys: list[str]
    failures: list[Failure]
    total: int

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """What the objective takes."""
        return {"images": self.images.to(device, non_blocking=True)}


class CropBatches(IterableDataset[CropBatch | V2FlowError]):
    """Endless batches of random square crops; loader worker w of W makes batches w, w + W, ... after ``start``.

    A sample that cannot be read is replaced by the next good one of the stream, so that batch b stays the same
    whoever makes it. What stops the stream is its last item: raised in a worker it would become another text.
    """

    def __init__(
        self, data: ImageData, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.data, self.batch_size, self.seed, self.start = data, batch_size, seed, start
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[CropBatch | V2FlowError]:
        try:
            yield from self._batches()
        except V2FlowError as error:
            yield error

    def _batches(self) -> Iterator[CropBatch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        stream = SampleStream(
            self.data.sources,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
            shuffle_shards=self.data.shuffle_shards,
            error_budget=self.data.error_budget,
        )
        first = self.start * self.batch_size
        refs = stream.refs(first)
        ahead: deque[SampleRef] = deque(itertools.islice(refs, TRIES))
        crops: list[Tensor] = []
        keys: list[str] = []
        failures = list(stream.failures)  # what damaged shards have lost, once
        for ordinal in itertools.count(first):
            if (ordinal // self.batch_size - self.start) % workers == worker:
                sample, image = _first_good(ahead, failures)
                rng = random.Random(f"{self.seed}/{self.rank}/{ordinal}")
                crops.append(random_crop(image, self.data, rng))
                keys.append(sample.key)
            if len(crops) == self.batch_size:
                yield CropBatch(torch.stack(crops), keys, failures, len(stream))
                crops, keys, failures = [], [], []
            ahead.popleft()
            ahead.append(next(refs))


def _first_good(refs: Iterable[SampleRef], failures: list[Failure]) -> tuple[Sample, Image.Image]:
    """The first of ``refs`` that can be read and decoded; bad ones before it go to ``failures``.

    Raises: DataError where all are bad.
    """
    for ref in refs:
        try:
            sample = ref.load()
            return sample, open_image(sample.image, name=sample.source)
        except DataError as error:
            reason = str(error).removeprefix(f"{ref.source}: ")
            failures.append(Failure(ref.source, reason, ref.key if ref.in_shard else None))
    raise DataError(f"{failures[-1].name}: {failures[-1].reason} So are {TRIES - 1} samples before it. Check the data.")


def random_crop(image: Image.Image, data: ImageData, rng: random.Random) -> Tensor:
    """A square crop (3, S, S): side drawn uniformly in [min_scale, max_scale] of the photo's short side."""
    width, height = image.size
    side = max(1.0, min(width, height) * rng.uniform(data.min_scale, data.max_scale))
    left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
    crop = crop_to_tensor(image, (left, top, left + side, top + side), data.crop_size)
    return crop.flip(-1) if data.horizontal_flip and rng.random() < 0.5 else crop


def crop_loader(
    data: ImageData, batch_size: int, *, seed: int, start: int, rank: int, world_size: int
) -> DataLoader[CropBatch | V2FlowError]:
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
