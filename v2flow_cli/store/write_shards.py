"""Writing WebDataset tars: what ``v2flow shard`` does, without the command line.

The same images and captions give the same bytes: members carry no time, user or group of this machine.
"""

from __future__ import annotations

import csv
import glob
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from webdataset import TarWriter

from v2flow_cli.errors import DataError
from v2flow_cli.store.files import map_ahead, replacing, sha256_of, write_bytes
from v2flow_cli.store.images import FoundFile, find_images, open_image, read_bytes
from v2flow_cli.store.shards import read_captions, safe_key

FORMAT, FORMAT_VERSION, MANIFEST = "v2flow-shards", 1, "manifest.json"
_IMAGE_COLUMNS = ("file", "image", "path", "file_name")
_CAPTION_COLUMNS = ("caption", "captions", "text")
_BATCH_AHEAD = 4  # images waiting per worker


@dataclass(frozen=True)
class Source:
    """An image to be written, and its captions."""

    image: FoundFile
    captions: tuple[str, ...]


@dataclass(frozen=True)
class ShardInfo:
    """One written shard, as the manifest lists it."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass
class ShardReport:
    """The shards of a set, and (source, reason) of each image that was left out."""

    shards: list[ShardInfo] = field(default_factory=list)
    captions: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


def sources_from_sidecars(folder: Path) -> Iterator[Source]:
    """Each image of ``folder`` with the captions, one a line, of the ``.txt`` beside it, if there is one."""
    for image in find_images([folder]):
        sidecar = image.path.with_suffix(".txt")
        yield Source(image, read_captions(read_bytes(sidecar)) if sidecar.is_file() else ())


def sources_from_classes(folder: Path) -> Iterator[Source]:
    """Each image of ``folder`` with the caption "a photo of NAME", NAME being the folder it lies in."""
    for image in find_images([folder]):
        name = image.path.parent.name.replace("_", " ").strip()
        yield Source(image, (f"a photo of {name}",) if image.path.parent != folder else ())


def sources_from_table(folder: Path, table: Path, failures: list[tuple[str, str]]) -> Iterator[Source]:
    """The images that a CSV or JSONL file lists, with their captions; missing ones go to ``failures``.

    Args:   table, with a column file, image, path or file_name (relative to ``folder``) and a column caption,
            captions or text; several rows of one image add up.
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
            failures.append((str(path), f"listed in {table}, but not an image in {folder}"))
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


def write_shards(
    sources: Iterable[Source],
    out: Path,
    *,
    prefix: str,
    shard_bytes: int,
    short_side: int | None = None,
    workers: int = 2,
    force: bool = False,
    report: ShardReport | None = None,
    tick: Callable[[int], None] = lambda advance: None,
) -> ShardReport:
    """Write ``PREFIX-000000.tar``, ... of about ``shard_bytes`` at most, and ``manifest.json``, into ``out``.

    JPEG, PNG and WebP files are stored as they are, others as PNG; with ``short_side`` (pixels), those whose
    shorter side is longer are made smaller and stored as JPEG.
    Returns: a report that lists bad images as failures; where all are bad, nothing is written or replaced.
    Raises:  DataError if ``out`` holds shards (unless ``force``), or cannot be written.
    """
    report = report or ShardReport()
    old = sorted(out.glob(f"{glob.escape(prefix)}-*.tar"))
    if not force and (old or (out / MANIFEST).exists()):
        raise DataError(f"{old[0] if old else out / MANIFEST}: exists already. Use --force, or another -o.")
    samples = _samples(sources, short_side, workers, report, tick)
    sample = next(samples, None)
    if sample is None:
        return report
    _remove([out / MANIFEST, *old])  # no mixture of two sets, however this run ends
    while sample is not None:
        path, count, size = out / f"{prefix}-{len(report.shards):06d}.tar", 0, 0
        with (
            replacing(path) as file,
            TarWriter(
                file,
                user="",
                group="",
                mode=0o644,
                mtime=0,
                encoder=False,
                compress=False,
                format="GNU_FORMAT",
            ) as tar,
        ):
            while sample is not None and (count == 0 or size + _tar_bytes(sample) <= shard_bytes):
                size += _tar_bytes(sample)
                tar.write(sample)
                count += 1
                sample = next(samples, None)
        report.shards.append(ShardInfo(path.name, count, path.stat().st_size, sha256_of(path)))
    _save_manifest(report, out)
    return report


def _samples(
    sources: Iterable[Source],
    short_side: int | None,
    workers: int,
    report: ShardReport,
    tick: Callable[[int], None],
) -> Iterator[dict[str, Any]]:
    """The good images as WebDataset samples, in order, under safe keys."""

    def load(source: Source) -> tuple[Source, str, bytes | DataError]:
        try:
            return source, *_stored_form(source.image.path, short_side)
        except DataError as error:
            return source, "", error

    taken: set[str] = set()
    for source, extension, content in map_ahead(load, sources, workers, _BATCH_AHEAD * workers):
        tick(1)
        if isinstance(content, DataError):
            name = str(source.image.path)
            report.failures.append((name, str(content).removeprefix(f"{name}: ")))
            continue
        sample: dict[str, Any] = {"__key__": safe_key(source.image.key, taken), extension: content}
        if source.captions:
            sample["txt"] = "\n".join(source.captions).encode()
            report.captions += len(source.captions)
        yield sample


def _stored_form(path: Path, short_side: int | None) -> tuple[str, bytes]:
    """Extension and bytes to store.  Raises: DataError for a bad image, which is decoded here in full."""
    content = read_bytes(path)
    image = open_image(content, str(path))
    buffer = io.BytesIO()
    if short_side is not None and min(image.size) > short_side:
        scale = short_side / min(image.size)
        size = (max(short_side, round(image.width * scale)), max(short_side, round(image.height * scale)))
        image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95, subsampling=0)
        return "jpg", buffer.getvalue()
    if content.startswith(b"\xff\xd8"):
        return "jpg", content
    if content.startswith(b"\x89PNG"):
        return "png", content
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "webp", content
    image.save(buffer, "PNG")
    return "png", buffer.getvalue()


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"{path}: cannot be replaced ({error.strerror}).") from error


def _tar_bytes(sample: dict[str, Any]) -> int:
    """What the members take in a tar: a header block each, and data in whole blocks of 512 bytes."""
    return sum(512 + -(-len(v) // 512) * 512 for k, v in sample.items() if k != "__key__")


def _save_manifest(report: ShardReport, out: Path) -> None:
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "samples": report.samples,
        "captions": report.captions,
        "bytes": report.bytes,
        "shards": [asdict(shard) for shard in report.shards],
    }
    write_bytes(out / MANIFEST, json.dumps(record, indent=1).encode())
