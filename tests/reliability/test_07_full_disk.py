"""7. A disk that is full, at ten points: one sentence, nothing half-written, and the repeated command continues."""

import contextlib
import itertools
import os
import random
import subprocess

import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from v2flow_cli.errors import V2FlowError
from v2flow_cli.jobs.encode import SetEncoder, encode_shards
from v2flow_cli.jobs.shard import write_shards
from v2flow_cli.jobs.shard_sources import sources_from_sidecars
from v2flow_cli.recipe import load_recipe
from v2flow_cli.store.find import find_tars
from v2flow_cli.store.token_file import load_samples, load_token_ids
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.training.checkpoint import list_checkpoints, load_newest
from v2flow_cli.training.loop import train

from ..conftest import RECIPES

POINTS = [pytest.param(p, marks=[] if p in (2, 6) else pytest.mark.slow, id=str(p)) for p in range(10)]


@contextlib.contextmanager
def disk(folder, kib):
    """A file system of ``kib`` KiB at ``folder``; yields what makes it large."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("imgs"), random.Random(0)
    for i in range(40):
        Image.frombytes("RGB", (32, 32), rng.randbytes(3072)).save(folder / f"{i:02d}.png")
    return folder


@pytest.mark.parametrize("point", POINTS)
def test_shard(images, tmp_path, point):
    options = {"prefix": "s", "shard_bytes": 40_000}
    whole = write_shards(sources_from_sidecars(images), tmp_path / "whole", **options)
    with disk(tmp_path / "disk", 12 + 16 * point) as enlarge:
        out = tmp_path / "disk" / "out"
        with pytest.raises(V2FlowError, match="cannot be written"):
            write_shards(sources_from_sidecars(images), out, **options)
        assert not [path for path in out.glob("*") if not path.name.startswith(".")]  # nothing has its name yet
        enlarge()
        report = write_shards(sources_from_sidecars(images), out, **options)
        assert report.shards == whole.shards
        assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / "whole"))


@pytest.mark.parametrize("point", POINTS)
def test_encode(images, tmp_path, tiny_tokenizer_folder, point):
    write_shards(sources_from_sidecars(images), tmp_path / "tars", prefix="s", shard_bytes=16_000)
    encoder = SetEncoder(V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder))
    shards = find_tars([tmp_path / "tars"])

    def encode(out):
        return encode_shards(encoder, shards, out, force=False, tick=lambda n: None)

    with disk(tmp_path / "disk", 4 + 8 * point) as enlarge:  # a file takes a page of 4 KiB
        out = tmp_path / "disk" / "out"
        with pytest.raises(V2FlowError, match="cannot be written"):
            encode(out)
        for path in out.glob("*.npy"):
            assert len(load_token_ids(path, 64, 4)) == len(load_samples(path))
        enlarge()
        again = encode(out)
        assert again.good == 40 and again.files + again.kept_files == len(shards)
        assert not list(out.rglob("*.partial"))


@pytest.mark.parametrize("point", POINTS)
def test_train(images, tmp_path, point):
    with disk(tmp_path / "disk", 200 + 150 * point) as enlarge:
        out = tmp_path / "disk" / "run"
        changes = [f"data.sources=[{images}]", "data.crop_size=16", f"output={out}", "train.keep_checkpoints=9"]
        recipe = load_recipe(RECIPES / "tiny" / "autoencoder.yaml", [*changes, "train.save_every=1"])
        AcceleratorState._reset_state(True)
        with pytest.raises(V2FlowError, match="cannot be written"):
            train(recipe, resume=False, log=lambda message: None)
        found = list_checkpoints(out / "checkpoints")
        assert not found or load_newest(out / "checkpoints")[0] == found[-1]  # the newest is whole
        assert not (out / "model.safetensors").exists() or (out / "config.json").exists()
        enlarge()
        lines: list[str] = []
        assert train(recipe, resume=True, log=lines.append).steps == 6
        assert not found or any(f"{found[-1]} at step {len(found)}" in line for line in lines)


def test_a_read_only_folder_and_a_vanished_input(images, tmp_path, tiny_tokenizer_folder):
    encoder = SetEncoder(V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder))
    write_shards(sources_from_sidecars(images), tmp_path / "tars", prefix="s", shard_bytes=16_000)
    shards = find_tars([tmp_path / "tars"])
    with disk(tmp_path / "disk", 400):
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        with pytest.raises(V2FlowError, match=r"cannot be written \(Read-only file system\)"):
            encode_shards(encoder, shards, tmp_path / "disk" / "out", force=False, tick=lambda n: None)
    gone = shards[1].path
    gone.unlink()
    report = encode_shards(encoder, shards, tmp_path / "out", force=False, tick=lambda n: None)
    assert {f.source for f in report.failures} == {str(gone)}
    assert {f.reason for f in report.failures} == {"the shard is missing"}
    keys = [[f.key for f in report.failures], [s[0] for p in (tmp_path / "out").glob("*.npy") for s in load_samples(p)]]
    assert sorted(itertools.chain(*keys)) == [f"{i:02d}" for i in range(40)]  # each lost key by name
