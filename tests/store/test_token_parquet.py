"""Token sets as Parquet: the same images as in the .npy files, readable by others, refused where they do not belong."""

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from v2flow_cli.errors import TokenFileError
from v2flow_cli.runtime.extras import MissingExtra
from v2flow_cli.store import token_parquet
from v2flow_cli.store.token_file import read_token_set, save_samples, save_token_ids
from v2flow_cli.store.token_manifest import TokenManifest
from v2flow_cli.store.token_parquet import load_parquet_manifest, parquet_files, read_parquet, write_parquet
from v2flow_cli.store.token_sets import token_samples, token_set_manifest

IDS = np.arange(12).reshape(3, 4) % 7
SAMPLES = [("a", ("one fox", "a red fox")), ("b", ()), ("ü/c", ("Ölfass",))]


@pytest.fixture
def token_set(tmp_path):
    """Three rows of a tar and one single image, of a codebook of 64."""
    folder = tmp_path / "tokens"
    save_samples(folder / "set.npy", SAMPLES)
    save_token_ids(folder / "set.npy", IDS, 64)
    save_token_ids(folder / "cats/1.npy", np.array([63, 0, 1, 2]), 64)
    TokenManifest("0123456789abcdef", (32, 48), 64, 4, {"set": 3, "cats/1": 1}).save(folder)
    return folder


def plain(samples):
    return [(s.key, s.captions, s.token_ids.tolist()) for s in samples]


def test_datasets_reads_the_columns(token_set, tmp_path):
    (path,) = write_parquet(token_set)
    assert path == token_set / "tokens-00000.parquet"
    rows = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.column_names == ["key", "caption", "captions", "tokens", "height", "width"]
    assert rows["key"][:] == ["cats/1", "a", "b", "ü/c"]
    assert rows["caption"][:] == [None, "one fox", None, "Ölfass"]
    assert rows["captions"][1] == ["one fox", "a red fox"]
    assert rows["tokens"][:] == [[63, 0, 1, 2], *IDS.tolist()]
    assert set(rows["height"][:]) == {32} and set(rows["width"][:]) == {48}
    assert rows.features["tokens"].feature.dtype == "uint16"


def test_reading_gives_what_the_npy_files_hold(token_set, monkeypatch):
    monkeypatch.setattr(token_parquet, "ROWS_PER_GROUP", 1)
    monkeypatch.setattr(token_parquet, "ROWS_PER_FILE", 3)
    files = write_parquet(token_set)
    assert [path.name for path in files] == ["tokens-00000.parquet", "tokens-00001.parquet"]
    assert plain(read_parquet(files)) == plain(read_token_set(token_set))
    manifest = load_parquet_manifest(files)
    assert manifest.same_tokens(TokenManifest.load(token_set)) and manifest.count == 4
    monkeypatch.setattr(token_parquet, "ROWS_PER_FILE", 100)
    assert len(write_parquet(token_set)) == 1 and len(parquet_files(token_set)) == 1  # the second file is removed


def test_a_source_is_the_folder_or_its_parquet(token_set, tmp_path):
    (path,) = write_parquet(token_set)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    path.rename(moved / path.name)
    for source in (moved, moved / path.name):
        assert plain(token_samples(str(source))) == plain(token_samples(token_set))
        assert token_set_manifest(source).tokenizer_digest == "0123456789abcdef"
    with pytest.raises(TokenFileError, match="no token manifest and no Parquet file in it"):
        token_set_manifest(tmp_path)


def test_lengths_that_vary_are_kept(tmp_path):
    rows = [np.array([5]), np.array([1, 2, 3])]
    save_samples(tmp_path / "s.npy", [("a", ()), ("b", ())])
    save_token_ids(tmp_path / "s.npy", rows, 64)
    TokenManifest("d" * 16, (32, 32), 64, 3, {"s": 2}, variable_length=True, min_psnr_db=20.0).save(tmp_path)
    assert [ids for _, _, ids in plain(read_parquet(write_parquet(tmp_path)))] == [[5], [1, 2, 3]]


def rewrite(path, change=lambda table: table, metadata=None):
    table = change(pq.read_table(path))
    pq.write_table(table if metadata is None else table.replace_schema_metadata(metadata), path)


def test_foreign_files_are_errors(token_set):
    (path,) = write_parquet(token_set)
    content = path.read_bytes()
    rewrite(path, metadata={})
    with pytest.raises(TokenFileError, match=r"tokens-00000.parquet: no tokenizer digest in its metadata; expected"):
        load_parquet_manifest([path])
    path.write_bytes(content)
    rewrite(path, lambda table: table.drop_columns(["tokens"]))
    with pytest.raises(TokenFileError, match="no column tokens; expected key, caption"):
        load_parquet_manifest([path])
    path.write_bytes(content)
    rewrite(path, lambda table: table.slice(0, 0))
    with pytest.raises(TokenFileError, match="no row in it"):
        load_parquet_manifest([path])
    path.write_bytes(content)
    record = json.loads(pq.read_schema(path).metadata[b"v2flow"]) | {"format_version": 99}
    rewrite(path, metadata={"v2flow": json.dumps(record)})
    with pytest.raises(TokenFileError, match="format version 99; this v2flow reads up to"):
        load_parquet_manifest([path])
    for damaged in (b"", content[: len(content) // 2], b"PAR1" + content[4:-30] + content[:30]):
        path.write_bytes(damaged)
        with pytest.raises(TokenFileError, match="not a complete Parquet file"):
            list(read_parquet([path]))
    with pytest.raises(TokenFileError, match="no such file"):
        load_parquet_manifest([token_set / "none.parquet"])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([0, 1, 2, 64], r"a: an id outside \[0, 64\)"), ([1, 2], "a: 2 tokens; expected 4"), (None, "a: 0 tokens")],
)
def test_rows_are_checked(token_set, tokens, message):
    (path,) = write_parquet(token_set)

    def change(table):
        column = table.column("tokens").to_pylist()
        column[1] = tokens
        return table.set_column(3, "tokens", pa.array(column, pa.list_(pa.uint16())))

    rewrite(path, change)
    with pytest.raises(TokenFileError, match=message):
        list(read_parquet([path]))


def test_files_of_two_tokenizers_are_not_one_set(token_set):
    (path,) = write_parquet(token_set)
    record = json.loads(pq.read_schema(path).metadata[b"v2flow"]) | {"tokenizer_digest": "f" * 16}
    other = path.with_name("tokens-00001.parquet")
    other.write_bytes(path.read_bytes())
    rewrite(other, metadata={"v2flow": json.dumps(record)})
    with pytest.raises(
        TokenFileError, match=r"tokens of tokenizer f{16} at 32 px, .* has those of tokenizer 0123456789abcdef"
    ):
        load_parquet_manifest([path, other])


def test_without_pyarrow_the_extra_is_named(token_set, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"^Parquet needs .* pyarrow, .* pip install 'v2flow\[parquet\]'$"):
        write_parquet(token_set)
