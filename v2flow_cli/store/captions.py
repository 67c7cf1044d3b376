"""Captions from a ``.txt`` beside an image, from a tar's ``.txt`` or ``.json``, or from a JSON record."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

from v2flow_cli.errors import DataError
from v2flow_cli.store.images import read_bytes
from v2flow_cli.store.not_taken import NotTaken
from v2flow_cli.store.shard_index import SampleIndex, read_member
from v2flow_cli.store.text import CONTROL, decode_text, lines_of, load_json, one_line

CAPTION_FIELDS = ("caption", "captions", "text", "prompt")  # of a record, in this order


def read_captions(content: bytes, name: str | Path = "captions", not_taken: NotTaken | None = None) -> tuple[str, ...]:
    """One caption a line; blank lines are none. Bytes that are not UTF-8 become U+FFFD.

    Args:   name, what messages call the file; not_taken, where a file with such bytes, or zeros, is counted.
    """
    try:
        text, whole = decode_text(content, name), True
    except DataError:
        text, whole = decode_text(content, name, errors="replace"), False
    if not_taken is not None and (not whole or CONTROL.search(text)):
        not_taken.add(str(name), "captions with bytes that are no text", "save them as UTF-8")
    lines = lines_of(text)
    return tuple(line.strip() for line in lines if line.strip())


def sidecar_of(image: Path) -> Path | None:
    """The ``.txt`` (in any case) beside an image; None if there is no such file."""
    sidecars = (image.with_suffix(suffix) for suffix in (".txt", ".TXT", ".Txt"))
    return next((sidecar for sidecar in sidecars if os.path.isfile(sidecar)), None)


def captions_beside(image: Path, not_taken: NotTaken | None = None) -> tuple[str, ...]:
    """The captions in the ``.txt`` beside an image; none where there is no such file.

    Args:   not_taken, as ``read_captions`` takes it.
    Raises: DataError for one that cannot be read.
    """
    sidecar = sidecar_of(image)
    return () if sidecar is None else read_captions(read_bytes(sidecar), sidecar, not_taken)


def captions_of(file: BinaryIO, sample: SampleIndex, not_taken: NotTaken | None = None) -> tuple[str, ...]:
    """The captions in the sample's ``.txt`` member, else those in its ``.json``; none where it has neither.

    Args:   not_taken, as ``read_captions`` takes it.
    """
    place = f"{getattr(file, 'name', 'tar')}/{sample.key}"
    if "txt" in sample.members:
        return read_captions(read_member(file, sample.members["txt"]), f"{place}.txt", not_taken)
    if "json" not in sample.members:
        return ()
    content = read_member(file, sample.members["json"])
    try:
        return captions_in(load_json(content))
    except (ValueError, RecursionError, DataError):
        if not_taken is not None:
            not_taken.add(f"{place}.json", ".json files", "not JSON, so without a caption")
        return ()


def captions_in(record: Any) -> tuple[str, ...]:
    """The caption, or list of them, in a JSON record as img2dataset and JourneyDB write it."""
    if not isinstance(record, dict):
        return ()
    value = next((record[name] for name in CAPTION_FIELDS if record.get(name)), ())
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(one_line(text) for text in texts if isinstance(text, str) and text.strip())
