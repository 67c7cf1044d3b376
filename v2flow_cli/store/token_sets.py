"""Token sets that a recipe names: a folder of ``encode``, a Parquet file, or a folder of Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from v2flow_cli.errors import TokenFileError
from v2flow_cli.store.token_file import TokenSample, read_token_set
from v2flow_cli.store.token_manifest import TokenManifest
from v2flow_cli.store.token_parquet import load_parquet_manifest, parquet_files, read_parquet


def is_token_set(source: str | Path) -> bool:
    """True if ``source`` holds tokens.  Raises: TokenFileError for a damaged manifest."""
    return TokenManifest.load(Path(source)) is not None or bool(parquet_files(source))


def token_set_manifest(source: str | Path) -> TokenManifest:
    """The manifest of the tokens in ``source``.

    Raises: TokenFileError if there are none, or they are damaged; MissingExtra for Parquet without pyarrow.
    """
    manifest = TokenManifest.load(Path(source))
    if manifest is not None:
        return manifest
    files = parquet_files(source)
    if not files:
        raise TokenFileError(
            f"{source}: no token manifest and no Parquet file in it; expected the output of `v2flow encode`."
        )
    return load_parquet_manifest(files)


def token_samples(source: str | Path) -> Iterator[TokenSample]:
    """Every image of ``source`` with its captions and ids.  Raises: as ``token_set_manifest``, and for bad rows."""
    if TokenManifest.load(Path(source)) is None and (files := parquet_files(source)):
        return read_parquet(files)
    return read_token_set(Path(source))
