"""Token sets as Parquet, one row per image, for ``datasets`` and other table tools.

    key: string | caption: string, the first one, or null | captions: list<string> | tokens: list<uint16 or uint32> |
    height, width: int32, pixels

The file's metadata holds, under ``v2flow``, the content of ``manifest.json``, such as the tokenizer's digest.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from v2flow_cli.errors import TokenFileError, foreign_errors
from v2flow_cli.runtime.extras import extra
from v2flow_cli.runtime.publishing import check_published, publishing
from v2flow_cli.store.token_file import TokenSample, read_sized_token_set
from v2flow_cli.store.token_manifest import TokenManifest, load_manifest

ROWS_PER_FILE = 100_000
ROWS_PER_GROUP = 4096  # in memory at a time
METADATA = b"v2flow"
PREFIX = ".parquet-"  # of the folder in which the files of a set are written
COLUMNS = ("key", "caption", "captions", "tokens", "height", "width")


def require_parquet() -> Any:
    """``pyarrow.parquet``.  Raises: MissingExtra if it is not installed."""
    with extra("parquet", "pyarrow", "Parquet"):
        import pyarrow.parquet

        return pyarrow.parquet


def write_parquet(folder: Path) -> list[Path]:
    """Write the token set in ``folder`` as ``tokens-00000.parquet``, ... beside its files; their paths.

    They get their names when all are complete; files of an earlier call are replaced.
    Raises: TokenFileError and DataError for a set that cannot be read; TokenFileError if they cannot be written.
    """
    parquet, manifest = require_parquet(), load_manifest(folder)
    names: list[str] = []
    with (
        foreign_errors(f"{folder}: the Parquet files cannot be written", kind=TokenFileError),
        publishing(folder, PREFIX, r"tokens-\d{5}\.parquet") as partial,
    ):
        samples = read_sized_token_set(folder)
        group = list(itertools.islice(samples, ROWS_PER_GROUP))
        while group:
            names.append(f"tokens-{len(names):05d}.parquet")
            schema, rows = _schema(manifest), 0
            with parquet.ParquetWriter(partial / names[-1], schema, compression="zstd") as writer:
                while group and rows < ROWS_PER_FILE:
                    writer.write_table(_table(group, schema))
                    rows, group = rows + len(group), list(itertools.islice(samples, ROWS_PER_GROUP))
    return [folder / name for name in names]


def parquet_files(source: str | Path) -> list[Path]:
    """The Parquet files that ``source`` names, a file or a folder of them; empty where it names something else.

    Raises: TokenFileError where they are being replaced, or that was interrupted.
    """
    path = Path(source)
    check_published(path if path.is_dir() else path.parent, PREFIX, TokenFileError)
    if path.is_dir():
        return sorted(path.glob("*.parquet"))
    return [path] if path.suffix == ".parquet" else []


def load_parquet_manifest(files: Sequence[Path]) -> TokenManifest:
    """The manifest in the metadata of ``files``.

    Raises: TokenFileError for a file that is missing, damaged, without our metadata or columns, or of another set than
            the first.
    """
    parquet = require_parquet()
    manifests = []
    for path in files:
        if not path.is_file():
            raise TokenFileError(f"{path}: no such file.")
        with foreign_errors(f"{path}: not a complete Parquet file", kind=TokenFileError):
            file = parquet.ParquetFile(path)
            record = (file.schema_arrow.metadata or {}).get(METADATA)
            record = None if record is None else json.loads(record)
            columns, rows = set(file.schema_arrow.names), file.metadata.num_rows
        if not isinstance(record, dict):
            raise TokenFileError(
                f"{path}: no tokenizer digest in its metadata; expected a file of `encode --parquet`. A program "
                "that rewrites it has to keep the schema's metadata."
            )
        missing = [name for name in COLUMNS if name not in columns]
        if missing:
            raise TokenFileError(f"{path}: no column {missing[0]}; expected {', '.join(COLUMNS)}.")
        if not rows:
            raise TokenFileError(f"{path}: no row in it.")
        manifests.append(TokenManifest.of_record({**record, "files": {str(path): rows}, "count": rows}, path))
    first = manifests[0]
    for path, manifest in zip(files, manifests):
        if not manifest.same_tokens(first):
            raise TokenFileError(
                f"{path}: tokens of {manifest.description}; {files[0]} has those of {first.description}. Use separate "
                "folders."
            )
    return dataclasses.replace(first, files={k: v for manifest in manifests for k, v in manifest.files.items()})


def read_parquet(files: Sequence[Path]) -> Iterator[TokenSample]:
    """Every row of ``files``, a group at a time.

    Raises: TokenFileError as ``load_parquet_manifest``, and for ids out of range or of a wrong number.
    """
    parquet, manifest = require_parquet(), load_parquet_manifest(files)
    for path in files:
        with foreign_errors(f"{path}: not a complete Parquet file", kind=TokenFileError):
            for batch in parquet.ParquetFile(path).iter_batches(ROWS_PER_GROUP, columns=["key", "captions", "tokens"]):
                for row in batch.to_pylist():
                    yield _sample(row, manifest, path)


def _sample(row: dict[str, Any], manifest: TokenManifest, path: Path) -> TokenSample:
    key, captions, tokens = row["key"], row["captions"], row["tokens"]
    ids, (length, variable) = np.array(tokens or (), dtype=np.int64), manifest.lengths
    if not isinstance(key, str) or not all(isinstance(caption, str) for caption in captions or ()):
        raise TokenFileError(f"{path}: a row's key is {key!r} and its captions {captions!r}; expected strings.")
    if not 0 < len(ids) <= length or (not variable and len(ids) != length):
        raise TokenFileError(f"{path}: {key}: {len(ids)} tokens; expected {'1 to ' * variable}{length}.")
    if not 0 <= ids.min() <= ids.max() < manifest.codebook_size:
        raise TokenFileError(f"{path}: {key}: an id outside [0, {manifest.codebook_size}).")
    return TokenSample(key, tuple(captions or ()), ids)


Sized: TypeAlias = tuple[TokenSample, tuple[int, int]]  # with its height and width


def _schema(manifest: TokenManifest) -> Any:
    import pyarrow as arrow

    ids = arrow.uint16() if manifest.codebook_size <= 65_536 else arrow.uint32()
    text, pixels = arrow.string(), arrow.int32()
    types = (text, text, arrow.list_(text), arrow.list_(ids), pixels, pixels)
    record = {key: value for key, value in manifest.record().items() if key not in ("files", "count")}
    return arrow.schema(list(zip(COLUMNS, types)), metadata={METADATA: json.dumps(record)})


def _table(group: Sequence[Sized], schema: Any) -> Any:
    import pyarrow as arrow

    columns = [
        [sample.key for sample, _ in group],
        [sample.captions[0] if sample.captions else None for sample, _ in group],
        [list(sample.captions) for sample, _ in group],
        [sample.token_ids for sample, _ in group],
        [height for _, (height, _) in group],
        [width for _, (_, width) in group],
    ]
    return arrow.table([arrow.array(values, type=field.type) for values, field in zip(columns, schema)], schema=schema)
