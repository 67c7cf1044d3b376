"""2. Mutated token files, manifests, weights and configs: read as before, or one of our errors; nothing else."""

import json
import random
import shutil

import numpy as np
import pytest

from v2flow_cli.errors import V2FlowError
from v2flow_cli.store import shard_index
from v2flow_cli.store.shard_index import load_manifest
from v2flow_cli.store.token_file import load_samples, load_token_ids, save_samples, save_token_ids
from v2flow_cli.store.token_manifest import TokenManifest
from v2flow_cli.tokenizer import V2FlowTokenizer

COUNTS = [pytest.param(500, id="500"), pytest.param(20_000, id="20000", marks=pytest.mark.slow)]
MODEL_COUNTS = [pytest.param(12, id="12"), pytest.param(20_000, id="20000", marks=pytest.mark.slow)]


def mutate(content, rng):
    """A flipped, dropped, doubled or new stretch of bytes; half of the time near the start, where headers are."""
    changed = bytearray(content)
    at = rng.randrange(len(changed) if rng.random() < 0.5 else min(len(changed), 400))
    kind, length = rng.randrange(4), rng.randrange(1, 9)
    if kind == 0:
        changed[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del changed[at : at + length]
    elif kind == 2:
        changed[at:at] = changed[at : at + length]
    else:
        changed[at:at] = rng.randbytes(length)
    return bytes(changed)


def survive(path, content, read, count):
    """Every mutation of ``content`` either reads or is a V2FlowError; returns how many were refused."""
    rng, refused = random.Random(7), 0
    for _ in range(count):
        path.write_bytes(mutate(content, rng))
        try:
            read(path)
        except V2FlowError:
            refused += 1
    path.write_bytes(content)
    return refused


@pytest.mark.parametrize("count", COUNTS)
def test_token_files(tmp_path, count):
    path = tmp_path / "t.npy"
    save_token_ids(path, np.arange(64).reshape(4, 16), 64)
    refused = survive(path, path.read_bytes(), lambda p: np.array(load_token_ids(p, 64, 16)), count)
    assert 0 < refused < count
    save_samples(path, [("a", ("x", "y")), ("b", ())])
    keys = tmp_path / "t.samples.jsonl"
    assert survive(keys, keys.read_bytes(), lambda p: load_samples(path), count)


@pytest.mark.parametrize("count", COUNTS)
def test_manifests(tmp_path, count):
    TokenManifest("0" * 16, (32, 32), 64, 4, {"a/1": 1, "b": 12}).save(tmp_path)
    path = tmp_path / "manifest.json"
    assert survive(path, path.read_bytes(), lambda p: TokenManifest.load(tmp_path), count)
    shard = {"name": "s-0.tar", "samples": 3, "bytes": 9000, "sha256": "0" * 64, "index_sha256": "1" * 64}
    record = {"format": "v2flow-shards", "format_version": 1, "samples": 3, "bytes": 9000, "shards": [shard]}

    def read(_):
        shard_index._load_manifest.cache_clear()
        load_manifest(tmp_path)

    assert survive(path, json.dumps(record, indent=1).encode(), read, count)


@pytest.mark.parametrize("count", MODEL_COUNTS)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_model_folders(tmp_path, tiny_tokenizer_folder, name, count):
    folder = tmp_path / "model"
    shutil.copytree(tiny_tokenizer_folder, folder)
    path = folder / name
    assert survive(path, path.read_bytes(), lambda p: V2FlowTokenizer.from_pretrained(folder), count)
