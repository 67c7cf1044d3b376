"""Training crops in a fixed order: batch b does not depend on the number of workers, nor on resumes."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from v2flow_cli.errors import DataError, V2FlowError
from v2flow_cli.recipe.schema import ImageData
from v2flow_cli.store.failures import Failure
from v2flow_cli.store.images import open_image
from v2flow_cli.store.stream import Sample, SampleRef, SampleStream
from v2flow_cli.tokenizer.preprocess import crop_to_uint8, fitted_size, from_uint8

TRIES = 16  # successive bad samples that stop the training


@dataclass(frozen=True)
class CropBatch:
    """``pixels`` (B, H, W, 3), 8-bit, and the ``keys`` of their photos.

    total: samples in the set; failures: bad samples that were skipped for this batch.
    """

    pixels: Tensor
    keys: list[str]
    failures: list[Failure]
    total: int

    @property
    def images(self) -> Tensor:
        """(B, 3, S, S) in [-1, 1]."""
        return from_uint8(self.pixels)

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Inputs of the objective; pixels become floats on the device, so that fewer bytes are copied."""
        return {"images": from_uint8(self.pixels.to(device, non_blocking=True))}

    def pin_memory(self) -> CropBatch:
        """The batch in pinned memory, for asynchronous copies; DataLoader calls this."""
        return dataclasses.replace(self, pixels=self.pixels.pin_memory())


class CropBatches(IterableDataset[CropBatch | V2FlowError]):
    """Endless batches of random crops; loader worker w of W yields batches w, w + W, ... after ``start``.

    Crops are square; or, if the recipe lists ``aspects``, each batch draws one of them and has about the same area.

    A sample that cannot be read is replaced by the next good one of the stream, so that batch b is the same for any
    worker. The last item of the stream is its error: raised in a worker, its text would change.
    """

    def __init__(
        self,
        data: ImageData,
        batch_size: int,
        *,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        multiple: int = 8,
        output: str | None = None,
    ) -> None:
        """``multiple``, in pixels, of the sides of crops that are not square.

        ``output``: the folder of the run, which is not searched for photos.
        """
        self.data, self.batch_size, self.seed, self.start = data, batch_size, seed, start
        self.rank, self.world_size, self.output = rank, world_size, output
        self.sizes = [fitted_size(round(1000 * aspect), 1000, data.crop_size, multiple) for aspect in data.aspects]

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
            output=self.output,
        )
        first = self.start * self.batch_size
        refs = stream.refs(first)
        ahead: deque[SampleRef] = deque(itertools.islice(refs, TRIES))
        crops: list[Tensor] = []
        keys: list[str] = []
        failures = list(stream.failures)  # lost samples of damaged shards, in the first batch only
        for ordinal in itertools.count(first):
            if (ordinal // self.batch_size - self.start) % workers == worker:
                sample, image = _first_good(ahead, failures)
                rng = random.Random(f"{self.seed}/{self.rank}/{ordinal}")
                crops.append(random_crop(image, self.data, rng, self._size(ordinal // self.batch_size)))
                keys.append(sample.key)
            if len(crops) == self.batch_size:
                yield CropBatch(torch.stack(crops), keys, failures, len(stream))
                crops, keys, failures = [], [], []
            ahead.popleft()
            ahead.append(next(refs))

    def _size(self, batch: int) -> tuple[int, int]:
        """(height, width) of the crops of a batch: the same on every rank, so that all have the same work."""
        if not self.sizes:
            return self.data.crop_size, self.data.crop_size
        return random.Random(f"{self.seed}/size/{batch}").choice(self.sizes)


def _first_good(refs: Iterable[SampleRef], failures: list[Failure]) -> tuple[Sample, Image.Image]:
    """The first of ``refs`` that can be read and decoded; bad ones before it are added to ``failures``.

    Raises: DataError if all are bad.
    """
    for ref in refs:
        try:
            sample = ref.load()
            return sample, open_image(sample.image, name=sample.source)
        except DataError as error:
            failures.append(Failure.of(error, ref.source, ref.key if ref.in_shard else None))
    raise DataError(
        f"{failures[-1].name}: {failures[-1].reason} The {TRIES - 1} samples before it are bad too. Check the data."
    )


def random_crop(image: Image.Image, data: ImageData, rng: random.Random, size: tuple[int, int]) -> Tensor:
    """A crop (H, W, 3), 8-bit: its share of the largest such crop's sides is uniform in [min_scale, max_scale]."""
    width, height = image.size
    aspect = size[1] / size[0]
    wide = max(1.0, min(width, height * aspect) * rng.uniform(data.min_scale, data.max_scale))
    high = min(float(height), max(1.0, wide / aspect))
    left, top = rng.uniform(0, width - wide), rng.uniform(0, height - high)
    crop = crop_to_uint8(image, (left, top, left + wide, top + high), size)
    return crop.flip(1) if data.horizontal_flip and rng.random() < 0.5 else crop


def crop_loader(
    data: ImageData,
    batch_size: int,
    *,
    seed: int,
    start: int,
    rank: int,
    world_size: int,
    multiple: int = 8,
    output: str | None = None,
) -> DataLoader[CropBatch | V2FlowError]:
    """A loader of ``CropBatches`` from batch ``start`` on."""
    where = dict(start=start, rank=rank, world_size=world_size)
    batches = CropBatches(data, batch_size, seed=seed, multiple=multiple, output=output, **where)
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=data.workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if data.workers else None,
        multiprocessing_context="spawn" if data.workers else None,
        persistent_workers=False,
    )


def first_crops(
    data: ImageData,
    batch_size: int,
    *,
    seed: int,
    rank: int,
    world_size: int,
    per_photo: int = 1,
    output: str | None = None,
) -> Iterator[CropBatch]:
    """Batches of the first crops of the stream, ``per_photo`` of each photo of this rank; the last may be smaller.

    Raises:  V2FlowError, the error of the stream.
    """
    done = 0
    for batch in crop_loader(data, batch_size, seed=seed, start=0, rank=rank, world_size=world_size, output=output):
        if isinstance(batch, V2FlowError):
            raise batch
        count = max(1, batch.total // world_size) * per_photo
        left = count - done
        yield dataclasses.replace(batch, pixels=batch.pixels[:left], keys=batch.keys[:left])
        done += batch_size
        if done >= count:
            return


def shuffled_rows(total: int, batch_size: int, *, seed: int, start: int) -> Iterator[np.ndarray]:
    """Endless batches of row numbers (B,) in [0, total), from batch ``start`` on; each epoch is a permutation."""
    epoch, order = -1, np.empty(0, int)
    for first in itertools.count(start * batch_size, batch_size):
        rows = np.empty(batch_size, int)
        for i in range(batch_size):
            if (first + i) // total != epoch:
                epoch = (first + i) // total
                order = np.random.default_rng([seed, epoch]).permutation(total)
            rows[i] = order[(first + i) % total]
        yield rows
