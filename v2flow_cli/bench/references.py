"""Titled pictures that drawings are compared with, some of them held out to measure the judge."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from v2flow_cli.bench.prompts import COLOURS, phrase_of, without_colour
from v2flow_cli.errors import DataError
from v2flow_cli.store.captions import read_captions
from v2flow_cli.store.find import find_inputs
from v2flow_cli.store.images import open_image, read_bytes
from v2flow_cli.store.shard_index import read_member
from v2flow_cli.store.shards import index_shard, open_shard

TEXTS: tuple[str, ...] = ("json", "txt")  # suffixes of the files beside a picture
MARGIN = 0.1  # of its longest side, around a cut-out, because the background is fitted to the border
HELD_OUT_SHARE = 0.25  # of the titles with at least three pictures, of which one picture is held out


@dataclass(frozen=True)
class Reference:
    """One picture.  names: its possible names in lower case, the title first; colour: its main one, or ""."""

    key: str
    content: bytes  # of its file
    names: tuple[str, ...]
    colour: str

    @property
    def noun(self) -> str:
        """Its title without the colour."""
        return without_colour(self.names[0])

    def pixels(self) -> np.ndarray:
        """(H, W, 3) uint8; a cut-out is placed on white with a margin.  Raises: DataError for a damaged file."""
        image = open_image(self.content, self.key)
        with Image.open(io.BytesIO(self.content)) as opened:
            if not opened.has_transparency_data:
                return np.asarray(image)
        return np.asarray(ImageOps.expand(image, round(MARGIN * max(image.size)), "white"))


def read_references(sources: Sequence[str]) -> list[Reference]:
    """The titled pictures of tars and folders, with KEY.json or KEY.txt beside each KEY.webp (jpg, png, ...).

    In ``KEY.json`` ``title`` counts, and optionally ``colour_title`` and ``colours``; in ``KEY.txt`` every line, such
    as "a red apple" or "a drawing of an apple".
    Raises:  DataError if no picture has a title, or a shard is damaged.
    """
    references: dict[str, Reference] = {}
    for source in sources:
        for key, content, record, captions in _samples(source):
            names, colour = _names(record, captions)
            if names:
                references.setdefault(key, Reference(key, content, names, colour))
    if not references:
        raise DataError(
            f"{', '.join(sources)}: no picture with a title; expected KEY.json with a title, or KEY.txt, beside each."
        )
    return [references[key] for key in sorted(references)]


def _samples(source: str) -> Iterator[tuple[str, bytes, dict, tuple[str, ...]]]:
    """(key, bytes of the picture, JSON record, lines of the text) of every picture."""
    files = find_inputs([source])
    for shard in (tar.path for tar in files.tars):
        index = index_shard(shard)
        for failure in index.failures:
            raise DataError(f"{failure.name}: {failure.reason}")
        with open_shard(shard) as file:
            for sample in index.samples:
                if sample.image is not None:
                    texts = {e: read_member(file, sample.members[e]) for e in TEXTS if e in sample.members}
                    yield sample.key, read_member(file, sample.members[sample.image]), *_texts(texts)
    for image in files.images:
        paths = {e: image.path.with_suffix(f".{e}") for e in TEXTS}
        texts = {e: read_bytes(path) for e, path in paths.items() if path.is_file()}
        yield image.key, read_bytes(image.path), *_texts(texts)


def _texts(texts: dict[str, bytes]) -> tuple[dict, tuple[str, ...]]:
    try:
        record = json.loads(texts.get("json", b"{}"))
    except (ValueError, RecursionError):
        record = {}
    return record if isinstance(record, dict) else {}, read_captions(texts.get("txt", b""))


def _names(record: dict, captions: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """(names, main colour) from the files beside a picture."""
    titles = [record[key] for key in ("title", "colour_title") if isinstance(record.get(key), str)]
    phrases = [phrase_of(text) for text in (*titles, *captions) if text.strip()]
    names = [name for phrase in phrases for name in (phrase, without_colour(phrase), phrase.removesuffix(" face"))]
    colours = record.get("colours")
    listed = [str(c) for c in colours if c in COLOURS] if isinstance(colours, list) else []
    worded = [phrase.split(" ")[0] for phrase in phrases if without_colour(phrase) != phrase]
    return tuple(dict.fromkeys(names)), next(iter((*worded, *listed)), "")


def split_held_out(references: Sequence[Reference]) -> tuple[list[Reference], list[Reference]]:
    """(references, held-out pictures): one picture of a quarter of the titles that have three is held out, by hash."""
    of_noun: dict[str, list[Reference]] = defaultdict(list)
    for reference in references:
        of_noun[reference.noun].append(reference)
    titles = sorted((noun for noun, group in of_noun.items() if len(group) >= 3), key=_hash)
    chosen = titles[: math.ceil(HELD_OUT_SHARE * len(titles))]
    held = {min(of_noun[noun], key=lambda r: _hash(r.key)).key for noun in chosen}
    return [r for r in references if r.key not in held], [r for r in references if r.key in held]


def nouns_with_colours(references: Sequence[Reference], least: int = 2) -> dict[str, set[str]]:
    """The nouns that are the title of at least ``least`` pictures, with the colours of these."""
    pictures: dict[str, int] = defaultdict(int)
    colours: dict[str, set[str]] = defaultdict(set)
    for reference in references:
        pictures[reference.noun] += 1
        colours[reference.noun] |= {reference.colour} - {""}
    return {noun: colours[noun] for noun in sorted(pictures) if pictures[noun] >= least}


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
