"""Captions from a ``.txt`` beside an image, from a tar's ``.txt`` or ``.json``, or from a JSON record."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

from v2flow_cli.errors import DataError
from v2flow_cli.store.images import read_bytes
from v2flow_cli.store.shard_index import SampleIndex, read_member
from v2flow_cli.store.text import decode_text, lines_of, load_json, one_line

CAPTION_FIELDS = ("caption", "captions", "text", "prompt")  # of a record, in this order


def read_captions(content: bytes) -> tuple[str, ...]:
    """One caption a line; blank lines are skipped, bytes that are not text are replaced."""
    lines = lines_of(decode_text(content, "captions", errors="replace"))
    return tuple(line.strip() for line in lines if line.strip())


def sidecar_of(image: Path) -> Path | None:
    """The ``.txt`` (in any case) beside an image; None if there is no such file."""
    sidecars = (image.with_suffix(suffix) for suffix in (".txt", ".TXT", ".Txt"))
    return next((sidecar for sidecar in sidecars if os.path.isfile(sidecar)), None)


def captions_beside(image: Path) -> tuple[str, ...]:
    """The captions in the ``.txt`` beside an image; empty if there is no such file.

    Raises: DataError for a file that cannot be read.
    """
    sidecar = sidecar_of(image)
    return () if sidecar is None else read_captions(read_bytes(sidecar))


def captions_of(file: BinaryIO, sample: SampleIndex) -> tuple[str, ...]:
    """The captions in the sample's ``.txt`` member, else those in its ``.json``, else empty."""
    if "txt" in sample.members:
        return read_captions(read_member(file, sample.members["txt"]))
    if "json" not in sample.members:
        return ()
    content = read_member(file, sample.members["json"])
    try:
        return captions_in(load_json(content))
    except (ValueError, RecursionError, DataError):  # a .json that holds something else
        return ()


def captions_in(record: Any) -> tuple[str, ...]:
    """The caption, or list of them, in a JSON record as img2dataset and JourneyDB write it."""
    if not isinstance(record, dict):
        return ()
    value = next((record[name] for name in CAPTION_FIELDS if record.get(name)), ())
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(one_line(text) for text in texts if isinstance(text, str) and text.strip())
