"""What ``v2flow shard`` packs: images with captions, from folders, tables, class folders or other tars."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v2flow_cli.errors import DataError
from v2flow_cli.store.failures import Failure
from v2flow_cli.store.images import FoundFile, find_images, read_bytes
from v2flow_cli.store.paths import fingerprint
from v2flow_cli.store.shards import (
    SampleIndex,
    captions_of,
    find_shard_files,
    index_shard,
    open_shard,
    read_captions,
    read_member,
)

_IMAGE_COLUMNS = ("file", "image", "path", "file_name", "img_path")
_CAPTION_COLUMNS = ("caption", "captions", "text", "prompt")


@dataclass(frozen=True)
class Source:
    """An image to be written, and its captions; with ``member`` both lie in the tar ``image.path``."""

    image: FoundFile
    captions: tuple[str, ...]
    member: SampleIndex | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.image.path) if self.member is None else f"{self.image.path}/{self.member.key}"

    @property
    def identity(self) -> str:
        """What tells, when a stopped run goes on, whether this is still the same image with the same captions."""
        return json.dumps([self.image.key, self.captions, fingerprint(self.image.path)])

    def read(self) -> tuple[bytes, tuple[str, ...]]:
        """The image's bytes and its captions.  Raises: DataError if they cannot be read."""
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


def sources_from_sidecars(folder: Path) -> Iterator[Source]:
    """Each image of ``folder`` with the captions, one a line, of the ``.txt`` beside it, if there is one."""
    for image in find_images([folder]):
        sidecar = image.path.with_suffix(".txt")
        yield Source(image, read_captions(read_bytes(sidecar)) if sidecar.is_file() else ())


def sources_from_classes(folder: Path, names: Mapping[str, str] | None = None) -> Iterator[Source]:
    """Each image of ``folder`` with the caption "a photo of NAME" after the folder it lies in.

    Args:   names, of folders that are not called by their names (``n02119022``).
    """
    for image in find_images([folder]):
        place = image.path.parent.name
        name = (names or {}).get(place, place.replace("_", " ").strip())
        yield Source(image, (f"a photo of {name}",) if image.path.parent != folder else ())


def read_class_names(path: Path) -> dict[str, str]:
    """Names of class folders, a line each: ``n02119022 red fox, Vulpes vulpes`` (the first name counts).

    Raises: DataError for a file that cannot be read, or a line without a name.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}).") from error
    names = {}
    for number, line in enumerate(lines, 1):
        folder, _, rest = line.strip().partition(" ")
        name = rest.split(",")[0].strip()
        if folder and not name:
            raise DataError(f"{path}: line {number} is {line!r}; expected a folder, a space and a name.")
        if folder:
            names[folder] = name
    return names


def sources_from_tars(given: Path, failures: list[Failure]) -> Iterator[Source]:
    """Each image in the tars of a folder, with its captions; keys begin with the tar's own, so they stay apart.

    What the tars have lost goes to ``failures``.
    """
    for shard in find_shard_files([given]):
        try:
            index = index_shard(shard.path)
        except DataError as error:
            failures.append(Failure(str(shard.path), str(error).removeprefix(f"{shard.path}: "), samples=None))
            continue
        failures += index.failures
        for sample in index.samples:
            if sample.image is not None:
                yield Source(FoundFile(shard.path, f"{shard.key}/{sample.key}"), (), sample)


def sources_from_table(folder: Path, table: Path, failures: list[Failure]) -> Iterator[Source]:
    """The images that a CSV or JSONL file lists, with their captions; missing ones go to ``failures``.

    Args:   table, with a column file, image, path, file_name or img_path (relative to ``folder``) and a column caption,
            captions, text or prompt; several rows of one image add up.
    Raises: DataError for a table that cannot be read or lacks these columns.
    """
    captions: dict[Path, list[str]] = {}
    for number, row in _rows(table):
        name = next((row[c] for c in _IMAGE_COLUMNS if isinstance(row.get(c), str) and row[c].strip()), None)
        text = next((row[c] for c in _CAPTION_COLUMNS if row.get(c) is not None), None)
        texts = [text] if isinstance(text, str) else text
        if name is None or not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            raise DataError(
                f"{table}: row {number} needs an image ({', '.join(_IMAGE_COLUMNS)}) "
                f"and a caption or a list of them ({', '.join(_CAPTION_COLUMNS)})."
            )
        captions.setdefault(folder / name.strip(), []).extend(" ".join(t.split()) for t in texts if t.strip())
    images = {image.path.absolute(): image for image in find_images([folder])}
    for path, texts in captions.items():
        image = images.get(path.absolute())
        if image is None:
            failures.append(Failure(str(path), f"listed in {table}, but not an image in {folder}"))
        else:
            yield Source(image, tuple(texts))


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = table.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{table}: cannot be read as UTF-8 text ({error}).") from error
    if table.suffix.lower() == ".csv":
        yield from enumerate(csv.DictReader(lines), 2)
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{table}: row {number} is not JSON ({error}).") from error
            yield number, row if isinstance(row, dict) else {}
