"""Token files: plain ``.npy`` of ids, their keys and captions, and the sets that ``encode`` writes.

    tokens/manifest.json         see token_manifest.py
    tokens/cats/1.npy            (L,), one image; or
    tokens/set-000.npy           (N, L), one shard, and
    tokens/set-000.samples.jsonl N lines {"key": ..., "captions": [...]}, in the order of the rows

If images keep their shapes (``aspect`` is keep), each ``.npy`` has such lines, with {"size": [height, width]} too.

If lengths vary (``variable_length``), L is that of the image, or of the longest row, and shorter rows are padded with
the id K, one more than the largest id, so that a reader without support for it fails instead of decoding wrong tokens.

Ids are little-endian uint16 if the codebook has at most 65,536 entries, else uint32. docs/file-formats.md has the
details.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from v2flow_cli.errors import DataError, TokenFileError
from v2flow_cli.store.files import write_bytes
from v2flow_cli.store.text import decode_text, lines_of, load_json
from v2flow_cli.store.token_manifest import is_count, load_manifest
from v2flow_cli.store.unfinished import Unfinished


def check_finished(file: Path) -> None:
    """Raises: TokenFileError for an ``.npy`` that a running or killed ``encode`` has not written yet."""
    file = file.absolute()
    for folder in file.parents:
        journal = Unfinished(folder)
        if journal.exists:
            key = file.relative_to(folder).with_suffix("").as_posix()
            if key in journal.planned() and key not in journal.finished():
                raise TokenFileError(
                    f"{file}: the encode that replaces it is running, or was stopped. Repeat its command first."
                )
            return


def save_token_ids(path: Path, token_ids: np.ndarray | Sequence[np.ndarray], codebook_size: int) -> None:
    """Write ids in [0, codebook_size), (L,) of one image or (N, L) of many, as a ``.npy`` of uint16 or uint32.

    Images of different lengths are a list of (L,), or rows padded with the id ``codebook_size``.
    """
    if not isinstance(token_ids, np.ndarray):
        rows = np.full((len(token_ids), max(map(len, token_ids))), codebook_size)
        for row, ids in zip(rows, token_ids):
            row[: len(ids)] = ids
        token_ids = rows
    buffer = io.BytesIO()
    short = codebook_size <= 65_536 and token_ids.max() < 65_536  # the padding is one id more
    np.save(buffer, token_ids.astype("<u2" if short else "<u4"), allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def load_token_ids(
    path: Path, codebook_size: int, tokens_per_image: int | None = None, variable_length: bool = False
) -> np.ndarray:
    """Ids (L,) or (N, L) of any integer type, all in [0, codebook_size), as a memory map.

    With ``variable_length`` L is at most ``tokens_per_image``, and rows may be padded with the id ``codebook_size``.
    Raises: TokenFileError for a file that is missing, damaged, not of integers, of another number of dimensions, out of
            range, or of another length than ``tokens_per_image``.
    """
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise TokenFileError(f"{path}: no such token file.") from None
    except Exception as error:  # NumPy's header parser raises ValueError, SyntaxError, EOFError, ...
        reason = " ".join(str(error).split())[:200]
        raise TokenFileError(f"{path}: not a complete .npy of token ids ({reason}).") from error
    if not isinstance(ids, np.memmap):
        raise TokenFileError(f"{path}: an archive of arrays; expected one .npy of token ids.")
    if not np.issubdtype(ids.dtype, np.integer):
        raise TokenFileError(f"{path}: dtype is {ids.dtype}; token ids are integers (uint16 or uint32).")
    if ids.ndim not in (1, 2) or ids.size == 0:
        raise TokenFileError(f"{path}: shape is {ids.shape}; expected (L,) for one image or (N, L) for many.")
    length, expected = ids.shape[-1], tokens_per_image
    if expected is not None and (length > expected if variable_length else length != expected):
        raise TokenFileError(f"{path}: {length} tokens an image; expected {'at most ' * variable_length}{expected}.")
    low, high = int(ids.min()), int(ids.max())
    padded = variable_length and ids.ndim == 2 and high == codebook_size
    if padded:
        ends = ids == codebook_size
        if ends[:, 0].any() or (ends[:, :-1] & ~ends[:, 1:]).any():
            raise TokenFileError(f"{path}: the padding {codebook_size} comes before an id, or fills a row.")
    if low < 0 or (high >= codebook_size and not padded):
        bad = low if low < 0 else high
        raise TokenFileError(f"{path}: holds the id {bad}; the codebook has ids 0 to {codebook_size - 1}.")
    return ids


def row_of(ids: np.ndarray, codebook_size: int) -> np.ndarray:
    """The ids (L',) int64 of one row without its padding."""
    return ids[ids < codebook_size].astype(np.int64)


def samples_path(path: Path) -> Path:
    """The file of keys and captions of the rows of ``path``, an (N, L) ``.npy``."""
    return path.with_suffix(".samples.jsonl")


def save_samples(
    path: Path, samples: Sequence[tuple[str, Sequence[str]]], sizes: Sequence[tuple[int, int]] | None = None
) -> None:
    """Write the (key, captions) of each row of ``path`` beside it, and its (height, width) in pixels from ``sizes``."""
    records: list[dict[str, Any]] = [{"key": key, "captions": list(captions)} for key, captions in samples]
    for record, size in zip(records, sizes or ()):
        record["size"] = list(size)
    lines = (json.dumps(record) + "\n" for record in records)
    write_bytes(samples_path(path), "".join(lines).encode())


def load_samples(path: Path) -> list[tuple[str, tuple[str, ...]]] | None:
    """(key, captions) of each row of ``path``; None if there is no such file beside it.

    Raises: TokenFileError for a line that is not {"key": string, "captions": [strings]}.
    """
    lines = _sample_lines(path)
    return None if lines is None else [(record["key"], tuple(record["captions"])) for record in _records(path, lines)]


def load_sizes(path: Path) -> list[tuple[int, int]]:
    """(height, width) in pixels of each row of ``path``, if images keep their shapes.

    Raises: TokenFileError as ``load_samples``, and for a missing size.
    """
    records = enumerate(_records(path, _sample_lines(path) or ()), 1)
    sizes = [_size(record, number, path) for number, record in records]
    if not sizes:
        raise TokenFileError(f"{samples_path(path)}: missing or empty, but it holds the images' sizes.")
    return sizes


def _size(record: dict[str, Any], number: int, path: Path) -> tuple[int, int]:
    """The size in line ``number`` of the samples of ``path``."""
    size = record.get("size")
    if not isinstance(size, list) or len(size) != 2 or not all(map(is_count, size)):
        raise TokenFileError(f"{samples_path(path)}: line {number}: size is {size!r}; expected [height, width].")
    return size[0], size[1]


def _sample_lines(path: Path) -> list[str] | None:
    file = samples_path(path)
    try:
        return lines_of(decode_text(file.read_bytes(), file))
    except FileNotFoundError:
        return None
    except (OSError, DataError) as error:
        raise TokenFileError(f"{file}: cannot be read ({error}).") from error


def _records(path: Path, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The checked records of ``lines``, one at a time: parsed ones take five times the memory of their text."""
    file = samples_path(path)
    for number, line in enumerate(lines, 1):
        try:
            record = load_json(line)
        except (ValueError, RecursionError) as error:
            raise TokenFileError(f"{file}: line {number} is not JSON ({error}).") from error
        record = record if isinstance(record, dict) else {}
        key, captions = record.get("key"), record.get("captions")
        if not isinstance(key, str) or not isinstance(captions, list) or set(map(type, captions)) - {str}:
            raise TokenFileError(f'{file}: line {number}: expected {{"key": string, "captions": strings}}.')
        yield record


class TokenSample(NamedTuple):
    """One image of a token set.  token_ids: (L,) int64, without padding."""

    key: str
    captions: tuple[str, ...]
    token_ids: np.ndarray


def read_token_set(folder: Path) -> Iterator[TokenSample]:
    """Every image of a folder that ``encode`` wrote, by file and row, with one file mapped at a time.

    Captions are those of the ``.txt`` beside an image file, or of the tar.
    Raises: TokenFileError for a folder without manifest, or a file that does not fit it.
    """
    return (sample for sample, _ in read_sized_token_set(folder))


def read_sized_token_set(folder: Path) -> Iterator[tuple[TokenSample, tuple[int, int]]]:
    """As ``read_token_set``, each image with its (height, width) in pixels."""
    manifest = load_manifest(folder)
    for name, count in sorted(manifest.files.items()):
        path = folder / f"{name}.npy"
        ids = np.atleast_2d(load_token_ids(path, manifest.codebook_size, *manifest.lengths))
        lines = _sample_lines(path)
        if not len(ids) == len(lines or (name,)) == count:
            raise TokenFileError(
                f"{path}: {len(ids)} rows, {len(lines or (name,))} keys, and {count} in the manifest. Encode it again."
            )
        if not lines and manifest.keep_aspect:
            raise TokenFileError(f"{samples_path(path)}: missing or empty, but it holds the images' sizes.")
        records: Iterable[dict[str, Any]] = _records(path, lines) if lines else [{"key": name, "captions": ()}]
        for number, (record, row) in enumerate(zip(records, ids), 1):
            size = _size(record, number, path) if manifest.keep_aspect else manifest.image_size
            yield TokenSample(record["key"], tuple(record["captions"]), row_of(row, manifest.codebook_size)), size
