"""What ``v2flow shard`` packs: images with captions, from folders, tables, class folders or other tars."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from v2flow_cli.errors import DataError
from v2flow_cli.store.captions import captions_beside, captions_of
from v2flow_cli.store.failures import Failure
from v2flow_cli.store.files import fingerprint
from v2flow_cli.store.find import InputFile, find_images, find_tars
from v2flow_cli.store.images import read_bytes
from v2flow_cli.store.names import safe_prefixes
from v2flow_cli.store.not_taken import NotTaken
from v2flow_cli.store.shard_index import SampleIndex, read_member
from v2flow_cli.store.shards import index_shard, open_shard
from v2flow_cli.store.tables import read_caption_table
from v2flow_cli.store.text import printable


@dataclass(frozen=True)
class Source:
    """An image to be written, and its captions; with ``member`` both lie in the tar ``image.path``.

    stamp: the fingerprint of the file, where it is known; problem: why its captions could not be read, which ``read``
    raises.
    """

    image: InputFile
    captions: tuple[str, ...]
    member: SampleIndex | None = None
    stamp: str | None = None
    problem: DataError | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return printable(str(self.image.path) if self.member is None else f"{self.image.path}/{self.member.key}")

    @property
    def identity(self) -> str:
        """What tells, when a stopped run goes on, whether this is still the same image with the same captions."""
        return json.dumps([self.image.key, self.captions, self.stamp or fingerprint(self.image.path)])

    def read(self) -> tuple[bytes, tuple[str, ...]]:
        """The image's bytes and its captions.  Raises: DataError if they cannot be read."""
        if self.problem is not None:
            raise self.problem
        if self.member is None:
            return read_bytes(self.image.path), self.captions
        assert self.member.image is not None  # sources_from_tars keeps no other
        with open_shard(self.image.path) as file:
            return read_member(file, self.member.members[self.member.image]), captions_of(file, self.member)

    def failed(self, error: DataError) -> Failure:
        """``error`` as the reason why this image was left out."""
        path = str(self.image.path)
        key = None if self.member is None else self.member.key
        return Failure(path, str(error).removeprefix(f"{self.name}: ").removeprefix(f"{path}: "), key)


def sources_from_sidecars(
    folder: Path, *, not_taken: NotTaken | None = None, exclude: Path | None = None
) -> Iterator[Source]:
    """Each image of ``folder`` with the captions, one a line, of the ``.txt`` beside it, if there is one.

    Args:   not_taken, exclude, as ``find_inputs`` takes them.
    """
    for image in find_images([folder], not_taken=not_taken, exclude=exclude):
        try:
            source = Source(image, captions_beside(image.path))
        except DataError as error:
            source = Source(image, (), problem=error)
        yield source


def sources_from_classes(
    folder: Path,
    names: Mapping[str, str] | None = None,
    *,
    not_taken: NotTaken | None = None,
    exclude: Path | None = None,
) -> Iterator[Source]:
    """Each image of ``folder`` with the caption "a photo of NAME" after the folder it lies in.

    Args:   names, of folders that are not called by their names (``n02119022``); the others as ``find_inputs``.
    """
    for image in find_images([folder], not_taken=not_taken, exclude=exclude):
        place = image.path.parent.name
        name = (names or {}).get(place, printable(place.replace("_", " ").strip()))
        yield Source(image, (f"a photo of {name}",) if image.path.parent != folder else ())


def sources_from_tars(
    given: Path | str, failures: list[Failure], *, not_taken: NotTaken | None = None, exclude: Path | None = None
) -> Iterator[Source]:
    """Each image in the tars of an input, with its captions; keys begin with the tar's own, so they stay apart.

    What the tars have lost goes to ``failures``, what else lies there to ``not_taken``.
    """
    left = NotTaken() if not_taken is None else not_taken
    tars = find_tars([given], not_taken=left, exclude=exclude)
    for shard, prefix in zip(tars, safe_prefixes([tar.key for tar in tars])):
        try:
            index = index_shard(shard.path)
        except DataError as error:
            failures.append(Failure(str(shard.path), str(error).removeprefix(f"{shard.path}: "), samples=None))
            continue
        failures += index.failures
        stamp = fingerprint(shard.path)
        left.merge(index.not_taken)
        for sample in index.samples:
            if sample.image is not None:
                yield Source(InputFile(shard.path, f"{prefix}/{sample.key}"), (), sample, stamp)


def sources_from_table(
    folder: Path,
    table: Path,
    failures: list[Failure],
    *,
    not_taken: NotTaken | None = None,
    exclude: Path | None = None,
) -> Iterator[Source]:
    """The images that a table lists, with their captions; several rows of one image add up, equal captions once.

    Files are named as they lie under ``folder`` or beside the table, accents composed or not, ``/`` or ``\\`` between.
    Listed images that are missing go to ``failures``, images that no row lists to ``not_taken``.
    Raises: DataError for a table that cannot be read or lacks its columns.
    """
    left = NotTaken() if not_taken is None else not_taken
    images = find_images([folder], not_taken=left, exclude=exclude)
    found = {os.path.abspath(image.path): image for image in images}
    composed = {_composed(path): image for path, image in found.items()}
    captions: dict[str, list[str]] = {}
    missing: dict[str, str] = {}
    for number, name, texts in read_caption_table(table):
        places = [os.path.abspath(root / n) for root in (folder, table.parent) for n in (name, name.replace("\\", "/"))]
        image = next((found[p] for p in places if p in found), None)
        image = image or next((composed[_composed(p)] for p in places if _composed(p) in composed), None)
        if image is None:
            missing.setdefault(places[0], f"listed in {table}, row {number}, but not an image in {folder}")
        else:
            captions.setdefault(os.path.abspath(image.path), []).extend(texts)
    failures += [Failure(path, reason) for path, reason in missing.items()]
    for path, image in found.items():
        if path not in captions:
            left.add(str(image.path), "images", f"no row of {table} lists them")
    for path, texts in captions.items():
        yield Source(found[path], tuple(dict.fromkeys(texts)))


def _composed(path: str) -> str:
    return unicodedata.normalize("NFC", path)
