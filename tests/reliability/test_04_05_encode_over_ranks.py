"""4 and 5. `encode` over ranks: each key once, the same bytes for any number of ranks, and after any kill."""

import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.reliability.processes import fork, ranks, wait
from v2flow_cli.errors import DataError
from v2flow_cli.jobs.encode import SetEncoder, encode_files, encode_shards
from v2flow_cli.jobs.shard import write_shards
from v2flow_cli.jobs.shard_sources import sources_from_sidecars
from v2flow_cli.recipe import load_recipe
from v2flow_cli.runtime.processes import Processes, launch
from v2flow_cli.store.find import find_images, find_tars
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.training import crops

from ..conftest import RECIPES

SHARDS, PER_SHARD = 7, 4


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_tokenizer_folder):
    """(folder of 7 shards of 4 images, its images, an encoder)."""
    root = tmp_path_factory.mktemp("set")
    rng = random.Random(0)
    for i in range(SHARDS * PER_SHARD):
        path = root / "imgs" / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.frombytes("RGB", (10, 10), rng.randbytes(300)).save(path, compress_level=0)
        path.with_suffix(".txt").write_text(f"caption {i}")
    # Image and caption take a block of 512 bytes each, and a header each.
    write_shards(sources_from_sidecars(root / "imgs"), root / "tars", prefix="s", shard_bytes=PER_SHARD * 2048)
    assert len(list((root / "tars").glob("*.tar"))) == SHARDS
    encoder = SetEncoder(V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder), batch_size=2)
    return root, encoder


def encode(world, out, loose=False):
    root, encoder = world
    with launch() as mine:
        options = {"force": False, "tick": lambda n: None, "ranks": mine}
        if loose:
            encode_files(encoder, find_images([root / "imgs"]), out, **options)
        else:
            encode_shards(encoder, find_tars([root / "tars"]), out, **options)


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("loose", [False, True], ids=["tars", "images"])
def test_the_same_bytes_for_any_number_of_ranks(world, tmp_path, loose):
    encode(world, tmp_path / "1", loose)
    clean = content(tmp_path / "1")
    for count in (2, 3):
        assert wait(ranks(partial(encode, world, tmp_path / str(count), loose), count), 120) == [0] * count
        assert content(tmp_path / str(count)) == clean
    assert json.loads(clean["manifest.json"])["count"] == SHARDS * PER_SHARD


def test_too_few_shards_is_an_error_before_anything_is_written(world, tmp_path):
    root, encoder = world
    with pytest.raises(DataError, match=r"7 tars for 8 processes.*--shard-mb"):
        shards = find_tars([root / "tars"])
        encode_shards(encoder, shards, tmp_path / "out", force=False, tick=lambda n: None, ranks=Processes(0, 8))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kills", [pytest.param(3, id="3"), pytest.param(20, id="20", marks=pytest.mark.slow)])
def test_killed_and_typed_again(world, tmp_path, kills):
    start = time.monotonic()
    assert wait(ranks(lambda: encode(world, tmp_path / "clean"), 2), 120) == [0, 0]
    seconds = time.monotonic() - start
    clean, rng = content(tmp_path / "clean"), random.Random(1)
    for i in range(kills):
        out = tmp_path / str(i)
        pids = ranks(partial(encode, world, out), 2)
        time.sleep(rng.uniform(0.0, seconds))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert wait(ranks(partial(encode, world, out), 2), 120) == [0, 0]
        assert content(out) == clean


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_training_sees_each_key_once_an_epoch(world, monkeypatch, world_size, workers):
    source = f"data.sources=[{world[0] / 'tars'}]"
    data = load_recipe(RECIPES / "tiny" / "autoencoder.yaml", [source, "data.crop_size=8"]).data
    seen: Counter[str] = Counter()
    batches = SHARDS * PER_SHARD // 2 // world_size  # of two photos
    for rank in range(world_size):
        loaders = []
        for worker in range(max(1, workers)):
            info = SimpleNamespace(id=worker, num_workers=workers) if workers else None
            monkeypatch.setattr(crops, "get_worker_info", lambda info=info: info)
            mine = iter(crops.CropBatches(data, 2, seed=5, rank=rank, world_size=world_size))
            loaders.append([next(mine), mine])  # the generator asks who it is at its first step
        for b in range(batches):
            first, rest = loaders[b % len(loaders)]
            batch = first if b < len(loaders) else next(rest)
            seen.update(batch.keys)
    assert len(seen) == SHARDS * PER_SHARD and set(seen.values()) == {1}


@pytest.mark.slow
def test_real_loader_processes_see_each_key_once_an_epoch(world):
    source = f"data.sources=[{world[0] / 'tars'}]"
    for workers in (0, 1, 2):
        changes = [source, "data.crop_size=8", f"data.workers={workers}"]
        data = load_recipe(RECIPES / "tiny" / "autoencoder.yaml", changes).data
        seen: Counter[str] = Counter()
        for rank in range(2):
            loader = crops.crop_loader(data, 2, seed=5, start=0, rank=rank, world_size=2)
            for batch in itertools.islice(loader, SHARDS * PER_SHARD // 4):
                seen.update(batch.keys)
        assert len(seen) == SHARDS * PER_SHARD and set(seen.values()) == {1}


def test_a_killed_rank_does_not_leave_the_other_one_waiting(world, tmp_path):
    def die_or_encode():
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        encode(world, tmp_path / "out")

    first, second = ranks(die_or_encode, 2)
    assert wait([second], 60) == [-signal.SIGKILL]
    os.kill(first, signal.SIGTERM)  # what a launcher does then
    (code,) = wait([first], 60)
    assert code is not None and code != 0
    assert wait([fork(lambda: encode(world, tmp_path / "out"))], 60) == [0]
