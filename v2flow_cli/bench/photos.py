"""The images of a bench, one at a time: from files, folders, globs and WebDataset tars."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from v2flow_cli.errors import DataError
from v2flow_cli.store.failures import Failure
from v2flow_cli.store.find import find_inputs
from v2flow_cli.store.images import open_image
from v2flow_cli.store.not_taken import NotTaken
from v2flow_cli.store.shards import iterate_shard


class PhotoReader:
    """Iterates over (name, RGB image) with unique names; bad images are skipped and listed in ``failed``.

    ``not_taken`` has the other files of the inputs.

    Raises:  DataError on construction for an input that is missing or holds neither images nor tars.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        self.failed: list[Failure] = []  # after an iteration
        self._listed = NotTaken()
        files = find_inputs(inputs, not_taken=self._listed)
        self.not_taken = self._listed
        self._images = [(file.key, file.path) for file in files.images]
        self._shards = [file.path for file in files.tars]

    @property
    def count(self) -> int | None:
        """Number of image files; None for tars, whose samples are not counted in advance."""
        return None if self._shards else len(self._images)

    def __iter__(self) -> Iterator[tuple[str, Image.Image]]:
        self.failed[:] = self._listed.lost  # without those of an earlier pass
        self.not_taken = NotTaken(dict(self._listed.groups))
        counts: Counter[str] = Counter()
        for key, name, source in self._sources():
            try:
                image = open_image(source, name)
            except DataError as error:
                self.failed.append(Failure.of(error, name))
                continue
            counts[key] += 1
            yield (key if counts[key] == 1 else f"{key} ({counts[key]})"), image

    def _sources(self) -> Iterator[tuple[str, str, Path | bytes]]:
        for key, path in self._images:
            yield key, str(path), path
        for shard in self._shards:
            try:
                for key, content, _ in iterate_shard(shard, self.failed, self.not_taken):
                    yield key, f"{shard}/{key}", content
            except DataError as error:
                self.failed.append(Failure.of(error, shard))
