"""The pictures to measure on, one at a time: files, folders, globs and WebDataset tars."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from v2flow_cli.errors import DataError
from v2flow_cli.jobs.encode import Failure
from v2flow_cli.store.images import SUFFIXES, expand_input, find_images, open_image
from v2flow_cli.store.shards import find_shards, iterate_shard


class PhotoReader:
    """Iterates over (name, RGB image), no name twice; bad ones are skipped and listed in ``failed``.

    Raises:  DataError at once for an input that is missing or holds neither images nor tars.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        self.failed: list[Failure] = []  # filled while iterating
        self._images: list[tuple[str, Path]] = []
        self._shards: list[Path] = []
        for given in inputs:
            suffixes = {path.suffix.lower() for path in expand_input(given)[1]}
            if ".tar" in suffixes:
                self._shards += find_shards([given])
            if suffixes & SUFFIXES or ".tar" not in suffixes:
                self._images += [(file.key, file.path) for file in find_images([given])]

    @property
    def count(self) -> int | None:
        """Number of image files; None where there are shards, whose samples are not counted beforehand."""
        return None if self._shards else len(self._images)

    def __iter__(self) -> Iterator[tuple[str, Image.Image]]:
        seen: Counter[str] = Counter()
        for key, name, source in self._sources():
            try:
                image = open_image(source, name)
            except DataError as error:
                self.failed.append(Failure(name, str(error).removeprefix(f"{name}: ")))
                continue
            seen[key] += 1
            yield (key if seen[key] == 1 else f"{key} ({seen[key]})"), image

    def _sources(self) -> Iterator[tuple[str, str, Path | bytes]]:
        for key, path in self._images:
            yield key, str(path), path
        for shard in self._shards:
            try:
                for key, content, _ in iterate_shard(shard):
                    yield key, f"{shard}/{key}", content
            except DataError as error:  # damaged: what was read of it counts
                self.failed.append(Failure(str(shard), str(error).removeprefix(f"{shard}: ")))
