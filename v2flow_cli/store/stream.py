"""The training data: an endless, shuffled, exactly resumable stream over shards or a folder of images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from v2flow_cli.errors import DataError
from v2flow_cli.store.captions import captions_beside, captions_of, sidecar_of
from v2flow_cli.store.failures import Failure, budget_error, over_budget
from v2flow_cli.store.find import InputFile, find_inputs
from v2flow_cli.store.images import read_bytes
from v2flow_cli.store.not_taken import NotTaken
from v2flow_cli.store.paths import same_place, user_path
from v2flow_cli.store.shard_index import SampleIndex, index_path, load_manifest, read_member
from v2flow_cli.store.shards import index_shard, open_shard

_OPEN_FILES = 16  # most shards kept open at a time


@dataclass(frozen=True)
class SampleRef:
    """A sample that is not read yet.  source: its shard or file; in_shard: True for a shard."""

    key: str
    source: str
    in_shard: bool
    load: Callable[[], Sample]  # raises DataError for a missing or damaged sample


@dataclass(frozen=True)
class Sample:
    """The encoded bytes of one image, its captions, and its shard or file (for messages)."""

    key: str
    image: bytes
    captions: tuple[str, ...]
    source: str


class SampleStream:
    """The samples of tars, folders of tars, or folders of images, in an order that the seed determines.

    Each epoch permutes the shards, and within every window of ``shuffle_shards`` shards all samples; a folder
    of images counts as one shard. Rank r of R takes the positions r, r + R, r + 2R, ... of that one endless
    order, so every sample is seen once per epoch whatever the number of ranks. Memory holds one window's
    indexes, and the listing of a folder of images. ``failures`` are the lost samples of damaged shards, ``not_taken``
    the files that are not used in the sources and in the shards that were indexed.

    Args:   sources, paths; shuffle_shards, shards whose samples are shuffled together; error_budget, share of
            the samples that damaged shards may have lost; output, the folder of the run, which is not searched.
    Raises: DataError for a source that is missing, has no images, is the output, or has lost more than the budget.
    """

    def __init__(
        self,
        sources: Sequence[str],
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle_shards: int = 8,
        error_budget: float = 0.0,
        output: str | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; expected 0 to {world_size - 1}")
        if shuffle_shards < 1:
            raise ValueError(f"shuffle_shards is {shuffle_shards}; expected at least 1")
        self.not_taken = NotTaken()
        out = None if output is None else user_path(output)
        self._shards = [shard for source in sources for shard in _shards_of(source, out, self.not_taken)]
        self.failures: list[Failure] = list(self.not_taken.lost)
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._window = shuffle_shards
        self._counts: dict[int, int] = {}  # samples of the shards counted so far
        self._indexed: set[int] = set()
        self._error_budget = error_budget
        if not self._shards:
            raise DataError("No data: the list of sources is empty.")

    def __len__(self) -> int:
        """Samples per epoch over all ranks; reads the index of every shard the first time."""
        return sum(self._count(i) for i in range(len(self._shards)))

    def uncaptioned(self) -> int:
        """Samples without a ``.txt`` or ``.json`` of their own; reads the index of every shard."""
        return sum(shard.uncaptioned(self._index(i)) for i, shard in enumerate(self._shards))

    def samples(self, start: int = 0) -> Iterator[Sample]:
        """This rank's samples from its ``start``-th on, endless; skipped samples are not read."""
        return (ref.load() for ref in self.refs(start))

    def refs(self, start: int = 0) -> Iterator[SampleRef]:
        """As ``samples``, but without reading them."""
        total = len(self)
        if not total:
            raise DataError(f"{self._shards[0].name}: no sample with an image in it.")
        if over_budget(self.failures, total, self._error_budget):
            raise budget_error(self.failures, self._error_budget)
        epoch, offset = divmod(start * self._world_size + self._rank, total)
        with _Files() as files:
            while True:
                order = np.random.default_rng([self._seed, epoch]).permutation(len(self._shards))
                offset = yield from self._one_epoch(epoch, order, offset, files)
                epoch += 1

    def epoch(self) -> Iterator[Sample]:
        """One pass over this rank's part: shards by name, samples in the order of the shard."""
        with _Files() as files:
            offset = self._rank
            for i in range(len(self._shards)):
                refs = self._index(i)
                for position in range(offset, len(refs), self._world_size):
                    yield self._shards[i].read(refs[position], files)
                offset = (offset - len(refs)) % self._world_size if offset < len(refs) else offset - len(refs)

    def _one_epoch(self, epoch: int, order: np.ndarray, offset: int, files: _Files) -> Generator[SampleRef, None, int]:
        """Yields every world_size-th sample from ``offset`` on; returns the offset into the next epoch."""
        for first in range(0, len(order), self._window):
            window = [int(i) for i in order[first : first + self._window]]
            size = sum(self._count(i) for i in window)
            if offset < size:
                refs = [(i, ref) for i in window for ref in self._index(i)]
                positions = np.random.default_rng([self._seed, epoch, first + 1]).permutation(size)
                while offset < size:
                    i, ref = refs[positions[offset]]
                    yield self._ref(i, ref, files)
                    offset += self._world_size
            offset -= size
        return offset

    def _ref(self, i: int, ref: Any, files: _Files) -> SampleRef:
        shard = self._shards[i]
        return SampleRef(ref.key, shard.source_of(ref), isinstance(shard, _Tar), lambda: shard.read(ref, files))

    def _count(self, i: int) -> int:
        if i not in self._counts:
            count = self._shards[i].manifest_count()
            self._counts[i] = len(self._index(i)) if count is None else count
        return self._counts[i]

    def _index(self, i: int) -> list:
        refs, failures, not_taken = self._shards[i].index()
        if i not in self._indexed:
            self._indexed.add(i)
            self.failures += failures
            self.not_taken.merge(not_taken)
        if len(refs) != self._counts.setdefault(i, len(refs)):
            raise DataError(f"{self._shards[i].name}: changed while it was being read.")
        return refs


class _Files:
    """A few open shards, with the least recently used closed first."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, BinaryIO] = OrderedDict()

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *exc: object) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def get(self, path: Path) -> BinaryIO:
        if path not in self._open:
            if len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            self._open[path] = open_shard(path)
        self._open.move_to_end(path)
        return self._open[path]


@dataclass(frozen=True)
class _Tar:
    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def manifest_count(self) -> int | None:
        """Samples by the manifest, if the shard still has the size in it."""
        info = load_manifest(self.path.parent).get(self.path.name)
        if info is None or not index_path(self.path).is_file() or not self.path.is_file():
            return None
        return info.samples if self.path.stat().st_size == info.bytes else None

    def index(self) -> tuple[list[SampleIndex], list[Failure], NotTaken]:
        index = index_shard(self.path)
        return [sample for sample in index.samples if sample.image is not None], index.failures, index.not_taken

    def uncaptioned(self, refs: Sequence[SampleIndex]) -> int:
        return sum(not {"txt", "json"} & ref.members.keys() for ref in refs)

    def source_of(self, ref: SampleIndex) -> str:
        return self.name

    def read(self, ref: SampleIndex, files: _Files) -> Sample:
        file = files.get(self.path)
        assert ref.image is not None  # index() keeps no other
        return Sample(ref.key, read_member(file, ref.members[ref.image]), captions_of(file, ref), self.name)


@dataclass(frozen=True)
class _Folder:
    path: Path
    images: list[InputFile]

    @property
    def name(self) -> str:
        return str(self.path)

    def manifest_count(self) -> int:
        return len(self.images)

    def index(self) -> tuple[list[InputFile], list[Failure], NotTaken]:
        return self.images, [], NotTaken()

    def uncaptioned(self, refs: Sequence[InputFile]) -> int:
        return sum(sidecar_of(ref.path) is None for ref in refs)

    def source_of(self, ref: InputFile) -> str:
        return str(ref.path)

    def read(self, ref: InputFile, files: _Files) -> Sample:
        return Sample(ref.key, read_bytes(ref.path), captions_beside(ref.path), str(ref.path))


def _shards_of(source: str, output: Path | None, not_taken: NotTaken) -> list[_Tar] | list[_Folder]:
    """The tars of a source, sorted, or its images as one shard."""
    if output is not None and same_place(output, source):
        raise DataError(
            f"{source}: the run's own output, so images that it writes would become data. Use another `output`, "
            "which may lie inside the source."
        )
    files = find_inputs([source], not_taken=not_taken, exclude=output)
    files.check_one_kind(source)
    return [_Tar(tar.path) for tar in files.tars] or [_Folder(user_path(source), files.images)]
