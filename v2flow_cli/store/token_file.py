"""Token files: plain ``.npy`` of ids, a ``manifest.json`` beside them, and the sets that ``encode`` writes.

    tokens/manifest.json         the tokenizer's digest, sizes, and files: {"cats/1": 1, ...}
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from v2flow_cli.errors import DataError, TokenFileError
from v2flow_cli.store.files import write_bytes
from v2flow_cli.store.text import decode_text, lines_of, load_json
from v2flow_cli.store.unfinished import Unfinished

FORMAT = "v2flow-tokens"
FORMAT_VERSION = 3  # 2 if lengths vary but all images are square, 1 if neither: older readers can still read those
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class TokenManifest:
    """The tokenizer, sizes and files of the tokens in a folder."""

    tokenizer_digest: str  # V2FlowTokenizer.token_digest
    image_size: tuple[int, int]  # height and width in pixels of the encoded images
    codebook_size: int  # K: ids lie in [0, K)
    tokens_per_image: int  # L; the maximum if lengths vary
    files: dict[str, int] = field(default_factory=dict)  # path under the folder without .npy -> images in it
    variable_length: bool = False  # images have 1 to tokens_per_image tokens
    min_psnr_db: float | None = None  # the PSNR by which the lengths were chosen, if they were
    sources: dict[str, str] = field(default_factory=dict)  # of files that come from tars: the tar's fingerprint
    keep_aspect: bool = False  # each image has its own size, with an area near that of ``image_size``
    refine_steps: int = 0  # gradient steps after the encoder (``encode --refine``)
    refined_by: str = ""  # V2FlowTokenizer.digest, if there were any: they depend on the decoder too

    @property
    def count(self) -> int:
        """Images in all files."""
        return sum(self.files.values())

    @property
    def lengths(self) -> tuple[int, bool]:
        """(L, whether lengths vary up to it), for ``load_token_ids``."""
        return self.tokens_per_image, self.variable_length

    def same_tokens(self, other: TokenManifest) -> bool:
        """True if both describe ids of the same tokenizer, image size and length."""
        return self._identity() == other._identity()

    def _identity(self) -> tuple[Any, ...]:
        lengths = self.tokens_per_image, self.variable_length, self.min_psnr_db
        tokenizer = self.tokenizer_digest, self.codebook_size, self.refine_steps, self.refined_by
        return *tokenizer, self.image_size, self.keep_aspect, *lengths

    @property
    def description(self) -> str:
        """What ``same_tokens`` compares, for messages."""
        shapes = ", in their own shapes" if self.keep_aspect else ""
        length = f", {'up to ' if self.variable_length else ''}{self.tokens_per_image} tokens an image"
        target = f" for {self.min_psnr_db:g} dB" if self.min_psnr_db is not None else ""
        refined = f", refined in {self.refine_steps} steps by model {self.refined_by}" if self.refine_steps else ""
        return f"tokenizer {self.tokenizer_digest} at {self.image_size[0]} px{shapes}{length}{target}{refined}"

    def check_square(self, where: str | Path) -> None:
        """Raises: TokenFileError for images that keep their shapes, because a language model draws squares."""
        if self.keep_aspect:
            raise TokenFileError(
                f"{where}: its images keep their shapes (`encode --aspect keep`), but a language model draws squares. "
                "Encode them with --aspect square."
            )

    def check_tokenizer(self, digest: str, where: str | Path) -> None:
        """Raises: TokenFileError if the ids are not those of the tokenizer with ``digest``."""
        if self.tokenizer_digest != digest:
            raise TokenFileError(
                f"{where}: encoded by tokenizer {self.tokenizer_digest}, but this tokenizer is {digest}. "
                "Use the --model that encoded them."
            )

    def save(self, folder: Path) -> None:
        """Write ``folder/manifest.json``.  Raises: DataError if a manifest of something else exists there."""
        check_manifest_is_ours(folder)
        write_bytes(folder / MANIFEST, json.dumps(self.record(), indent=1, ensure_ascii=False).encode())

    def record(self) -> dict[str, Any]:
        """The manifest as a JSON object."""
        return {
            "format": FORMAT,
            "format_version": 3 if self.keep_aspect else 2 if self.variable_length else 1,
            "tokenizer_digest": self.tokenizer_digest,
            "image_size": list(self.image_size),
            "codebook_size": self.codebook_size,
            "tokens_per_image": self.tokens_per_image,
            **({"variable_length": True, "min_psnr_db": self.min_psnr_db} if self.variable_length else {}),
            **({"aspect": "keep"} if self.keep_aspect else {}),
            **({"refine_steps": self.refine_steps, "refined_by": self.refined_by} if self.refine_steps else {}),
            "count": self.count,
            "files": self.files,
            **({"sources": self.sources} if self.sources else {}),
        }

    @classmethod
    def load(cls, folder: Path) -> TokenManifest | None:
        """The manifest in ``folder``; None if there is none, or a file of that name with another purpose.

        Raises: TokenFileError if it is damaged, inconsistent, or of a newer format version.
        """
        path = folder / MANIFEST
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise TokenFileError(f"{path}: cannot be read as JSON ({error}).") from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            return None
        return cls.of_record(record, path)

    @classmethod
    def of_record(cls, record: dict[str, Any], path: Path) -> TokenManifest:
        """The inverse of ``record``, for an object read from ``path``.  Raises: TokenFileError as ``load``."""
        version: Any = record.get("format_version")
        if not _is_count(version):
            raise TokenFileError(f"{path}: format_version is {version!r}; expected {FORMAT_VERSION}.")
        if version > FORMAT_VERSION:
            raise TokenFileError(
                f"{path}: format version {version}; this v2flow reads up to {FORMAT_VERSION}. Update v2flow."
            )
        digest: Any = record.get("tokenizer_digest")
        size: Any = record.get("image_size")
        files: Any = record.get("files")
        size = [size, size] if _is_count(size) else size
        problem = None
        if not isinstance(digest, str):
            problem = f"tokenizer_digest is {digest!r}; expected a string"
        elif not isinstance(size, list) or len(size) != 2 or not all(map(_is_count, size)):
            problem = f"image_size is {size!r}; expected [height, width] in pixels"
        elif not isinstance(files, dict) or not all(map(_is_count, files.values())):
            problem = "files is not a mapping of names to counts"
        else:
            for name in ("codebook_size", "tokens_per_image"):
                if not _is_count(record.get(name)):
                    problem = f"{name} is {record.get(name)!r}; expected a positive integer"
        if problem:
            raise TokenFileError(f"{path}: {problem}. Encode the images again.")
        variable: Any = record.get("variable_length", False)
        least: Any = record.get("min_psnr_db")
        if type(variable) is not bool or not (least is None or isinstance(least, float | int)):
            raise TokenFileError(
                f"{path}: variable_length is {variable!r} and min_psnr_db {least!r}; expected true or false, and a "
                "number or null. Encode the images again."
            )
        sources: Any = record.get("sources", {})
        if not isinstance(sources, dict) or set(map(type, sources.values())) - {str}:
            raise TokenFileError(f"{path}: sources is not a mapping of names to fingerprints. Encode the images again.")
        aspect: Any = record.get("aspect", "square")
        if aspect not in ("square", "keep"):
            raise TokenFileError(f"{path}: aspect is {aspect!r}; expected square or keep. Encode the images again.")
        refined: Any = (record.get("refine_steps", 0), record.get("refined_by", ""))
        if not (refined[0] == 0 or _is_count(refined[0])) or not isinstance(refined[1], str):
            raise TokenFileError(
                f"{path}: refine_steps is {refined[0]!r} and refined_by {refined[1]!r}; expected a number and a "
                "digest. Encode the images again."
            )
        counts = record["codebook_size"], record["tokens_per_image"]
        shapes = aspect == "keep"
        manifest = cls(digest, (size[0], size[1]), *counts, files, variable, least, sources, shapes, *refined)
        if record.get("count") != manifest.count:
            raise TokenFileError(f"{path}: count is {record.get('count')!r}; files add up to {manifest.count}.")
        return manifest


def load_manifest(folder: Path) -> TokenManifest:
    """The manifest of the tokens in ``folder``.  Raises: TokenFileError as ``TokenManifest.load``, and for none."""
    manifest = TokenManifest.load(folder)
    if manifest is None:
        raise TokenFileError(f"{folder}: no token manifest in it; expected the output of `v2flow encode`.")
    return manifest


def check_manifest_is_ours(folder: Path) -> None:
    """Raises: DataError if ``folder/manifest.json`` is not that of a token set: it must not be overwritten."""
    if (folder / MANIFEST).exists() and TokenManifest.load(folder) is None:
        raise DataError(
            f"{folder / MANIFEST}: exists, and is not the manifest of a set of tokens. It would be overwritten. Use "
            "another -o, or move it away."
        )


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def find_manifest(
    file: Path, load: Callable[[Path], TokenManifest | None] = TokenManifest.load
) -> TokenManifest | None:
    """The manifest that lists ``file`` (an ``.npy``), in its folder or one above it; None if there is none.

    Args:   load, as TokenManifest.load, possibly with a cache.
    Raises: TokenFileError for a damaged or newer manifest in one of these folders.
    """
    file = file.absolute()
    for folder in file.parents:
        manifest = load(folder)
        if manifest is not None:
            listed = file.relative_to(folder).with_suffix("").as_posix() in manifest.files
            return manifest if listed else None
    return None


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
    if not isinstance(size, list) or len(size) != 2 or not all(map(_is_count, size)):
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
