"""The images and captions that ``v2flow shard`` packs: from folders, tables, class folders or other tars."""

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
    """An image to write, and its captions; with ``member`` both are in the tar ``image.path``.

    stamp: the fingerprint of the file, if it is known; problem: the error from reading its captions, which ``read``
    raises; not_taken, where ``read`` counts captions in a tar that are not text.
    """

    image: InputFile
    captions: tuple[str, ...]
    member: SampleIndex | None = None
    stamp: str | None = None
    problem: DataError | None = None
    not_taken: NotTaken | None = None

    @property
    def name(self) -> str:
        """Its name in messages."""
        return printable(str(self.image.path) if self.member is None else f"{self.image.path}/{self.member.key}")

    @property
    def identity(self) -> str:
        """Text that changes with the image or its captions, by which a resumed run checks its sources."""
        return json.dumps([self.image.key, self.captions, self.stamp or fingerprint(self.image.path)])

    def read(self) -> tuple[bytes, tuple[str, ...]]:
        """The image's bytes and its captions.  Raises: DataError if they cannot be read."""
        if self.problem is not None:
            raise self.problem
        if self.member is None:
            return read_bytes(self.image.path), self.captions
        assert self.member.image is not None  # sources_from_tars yields no other
        with open_shard(self.image.path) as file:
            content = read_member(file, self.member.members[self.member.image])
            return content, captions_of(file, self.member, self.not_taken)

    def failed(self, error: DataError) -> Failure:
        """The failure of this image for the reason ``error``."""
        return Failure.of(error, self.image.path, None if self.member is None else self.member.key)


def sources_from_sidecars(
    folder: Path, *, not_taken: NotTaken | None = None, exclude: Path | None = None
) -> Iterator[Source]:
    """Each image of ``folder`` with the captions, one a line, of the ``.txt`` beside it, if there is one.

    Args:   not_taken, exclude, as ``find_inputs`` takes them.
    """
    for image in find_images([folder], not_taken=not_taken, exclude=exclude):
        try:
            source = Source(image, captions_beside(image.path, not_taken))
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
    """Each image of ``folder`` with the caption "a photo of NAME", where NAME is that of its own folder.

    Args:   names, of folders whose names are codes (``n02119022``); the others as ``find_inputs``.
    """
    for image in find_images([folder], not_taken=not_taken, exclude=exclude):
        parent = image.path.parent.name
        name = (names or {}).get(parent, printable(parent.replace("_", " ").strip()))
        yield Source(image, (f"a photo of {name}",) if image.path.parent != folder else ())


def sources_from_tars(
    source: Path | str, failures: list[Failure], *, not_taken: NotTaken | None = None, exclude: Path | None = None
) -> Iterator[Source]:
    """Each image in the tars of an input, with its captions; keys begin with the tar's own, so that they are unique.

    Lost samples are added to ``failures``, other files to ``not_taken``.
    """
    left = NotTaken() if not_taken is None else not_taken
    tars = find_tars([source], not_taken=left, exclude=exclude)
    for shard, prefix in zip(tars, safe_prefixes([tar.key for tar in tars])):
        try:
            index = index_shard(shard.path)
        except DataError as error:
            failures.append(Failure.of(error, shard.path, samples=None))
            continue
        failures += index.failures
        stamp = fingerprint(shard.path)
        left.merge(index.not_taken)
        for sample in index.samples:
            if sample.image is not None:
                yield Source(InputFile(shard.path, f"{prefix}/{sample.key}"), (), sample, stamp, not_taken=left)


def sources_from_table(
    folder: Path,
    table: Path,
    failures: list[Failure],
    *,
    not_taken: NotTaken | None = None,
    exclude: Path | None = None,
) -> Iterator[Source]:
    """The images that a table lists, with the different captions of all their rows.

    Names are relative to ``folder`` or to the table's folder, with composed or decomposed accents, and ``/`` or ``\\``.
    Listed images that are missing are added to ``failures``, images in no row to ``not_taken``.
    Raises: DataError for a table that cannot be read or lacks its columns.
    """
    left = NotTaken() if not_taken is None else not_taken
    images = find_images([folder], not_taken=left, exclude=exclude)
    by_path = {os.path.abspath(image.path): image for image in images}
    by_composed_path = {_composed(path): image for path, image in by_path.items()}
    captions: dict[str, list[str]] = {}
    missing: dict[str, str] = {}
    for number, name, texts in read_caption_table(table):
        names = (name, name.replace("\\", "/"))
        paths = [os.path.abspath(root / n) for root in (folder, table.parent) for n in names]
        image = next((by_path[path] for path in paths if path in by_path), None)
        image = image or next(filter(None, (by_composed_path.get(_composed(path)) for path in paths)), None)
        if image is None:
            missing.setdefault(paths[0], f"listed in {table}, row {number}, but not an image in {folder}")
        else:
            captions.setdefault(os.path.abspath(image.path), []).extend(texts)
    if not captions and not missing:
        raise DataError(f"{table}: no row below the header, so no image would be packed.")
    failures += [Failure(path, reason) for path, reason in missing.items()]
    for path, image in by_path.items():
        if path not in captions:
            left.add(str(image.path), "images", f"no row of {table} lists them")
    for path, texts in captions.items():
        yield Source(by_path[path], tuple(dict.fromkeys(texts)))


def _composed(path: str) -> str:
    return unicodedata.normalize("NFC", path)
