"""Titled pictures that drawings are compared with, some of them held out to measure the judge."""

from __future__ import annotations

import hashlib
import io
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from v2flow_cli.bench.prompts import COLOURS, phrase_of, without_colour
from v2flow_cli.errors import DataError
from v2flow_cli.store.captions import read_captions, sidecar_of
from v2flow_cli.store.find import find_inputs
from v2flow_cli.store.images import open_image, read_bytes
from v2flow_cli.store.not_taken import NotTaken
from v2flow_cli.store.shard_index import read_member
from v2flow_cli.store.shards import index_shard, open_shard
from v2flow_cli.store.text import load_json

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


def read_references(sources: Sequence[str], not_taken: NotTaken | None = None) -> list[Reference]:
    """The titled pictures of tars and folders: beside each KEY.webp (jpg, png, ...) lies KEY.json or KEY.txt.

    Of ``KEY.json`` ``title`` counts, and ``colour_title`` and ``colours`` where they are there; of ``KEY.txt`` every
    line, such as "a red apple" or "a drawing of an apple". What else lies there, pictures without a title above all,
    goes to ``not_taken``.
    Raises:  DataError where nothing has a title, or a shard is damaged.
    """
    left = NotTaken() if not_taken is None else not_taken
    references: dict[str, Reference] = {}
    for source in sources:
        for key, content, record, captions in _samples(source, left):
            names, colour = _names(record, captions)
            if not names:
                left.add(f"{source}/{key}", "pictures", "no title beside them")
            elif key in references:
                left.add(f"{source}/{key}", "pictures", "one of that name is there already")
            else:
                references[key] = Reference(key, content, names, colour)
    if not references:
        raise DataError(
            f"{', '.join(sources)}: no picture with a title; expected KEY.json with a title, or KEY.txt, beside each."
        )
    return [references[key] for key in sorted(references)]


def _samples(source: str, not_taken: NotTaken) -> Iterator[tuple[str, bytes, dict, tuple[str, ...]]]:
    """(key, bytes of the picture, JSON record, lines of the text) of every picture."""
    listed = NotTaken()
    files = find_inputs([source], not_taken=listed)
    not_taken.merge(NotTaken({group: what for group, what in listed.groups.items() if group[0] != ".json files"}))
    for shard in (tar.path for tar in files.tars):
        index = index_shard(shard)
        for failure in index.failures:
            raise DataError(f"{failure.name}: {failure.reason}")
        not_taken.merge(index.not_taken)
        with open_shard(shard) as file:
            for sample in index.samples:
                if sample.image is not None:
                    texts = {e: read_member(file, sample.members[e]) for e in TEXTS if e in sample.members}
                    yield sample.key, read_member(file, sample.members[sample.image]), *_texts(texts, shard, not_taken)
    for image in files.images:
        beside = {"json": image.path.with_suffix(".json"), "txt": sidecar_of(image.path)}
        texts = {e: read_bytes(path) for e, path in beside.items() if path is not None and path.is_file()}
        yield image.key, read_bytes(image.path), *_texts(texts, image.path, not_taken)


def _texts(texts: dict[str, bytes], place: Path, not_taken: NotTaken) -> tuple[dict, tuple[str, ...]]:
    try:
        record = load_json(texts.get("json", b"{}"))
    except (ValueError, RecursionError, DataError):
        record = {}
    captions = read_captions(texts.get("txt", b""), f"{place}: its captions", not_taken)
    return record if isinstance(record, dict) else {}, captions


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
