"""1. Truncations and flipped bits: what is lost is said, and what is used is whole."""

import io
import random

import pytest
from PIL import Image

from tests.store.test_shards import write_tar
from v2flow_cli.errors import DataError
from v2flow_cli.jobs.shard import write_shards
from v2flow_cli.jobs.shard_sources import sources_from_sidecars
from v2flow_cli.store.shard_index import read_member
from v2flow_cli.store.shards import index_shard, open_shard

COUNTS = [pytest.param(40, id="40"), pytest.param(300, id="300", marks=pytest.mark.slow)]
SAMPLES = 12


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """(path, its bytes, {key: {extension: bytes}}) of a shard with index and manifest."""
    root = tmp_path_factory.mktemp("shards")
    rng = random.Random(0)
    for i in range(SAMPLES):
        path = root / "imgs" / f"photo_{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.frombytes("RGB", (16, 16), rng.randbytes(768)).save(path)
        path.with_suffix(".txt").write_text(f"caption {i}\nagain")
    write_shards(sources_from_sidecars(root / "imgs"), root / "out", prefix="s", shard_bytes=10**7)
    path = root / "out" / "s-000000.tar"
    return path, path.read_bytes(), contents(path)[0]


def contents(path):
    """({key: {extension: bytes}} of what a reader would use, keys that it says are lost, other complaints)."""
    used, lost, complaints = {}, set(), 0
    try:
        index = index_shard(path)
    except DataError:
        return {}, set(), 1
    for failure in index.failures:
        lost |= {failure.key} if failure.key is not None else set()
        complaints += failure.key is None
    for sample in index.samples:
        try:
            with open_shard(path) as file:
                used[sample.key] = {e: read_member(file, m) for e, m in sample.members.items()}
        except DataError:
            lost.add(sample.key)
    return used, lost, complaints


def flipped(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("count", COUNTS)
def test_truncations(shard, count):
    path, content, whole = shard
    rng = random.Random(1)
    for size in [0, 1, 511, 512, *(rng.randrange(len(content)) for _ in range(count - 4))]:
        path.write_bytes(content[:size])
        used, lost, complaints = contents(path)
        assert all(whole[key] == members for key, members in used.items())
        assert used.keys() | lost == whole.keys() and not used.keys() & lost  # each key by name
        assert lost or complaints, f"cut at {size}: not noticed"
    path.write_bytes(content)


@pytest.mark.parametrize("count", COUNTS)
def test_flipped_bits(shard, count):
    path, content, whole = shard
    rng = random.Random(2)
    for _ in range(count):
        path.write_bytes(flipped(content, rng.randrange(8 * len(content))))
        used, lost, _ = contents(path)
        assert all(whole[key] == members for key, members in used.items())
        assert used.keys() | lost == whole.keys() and len(lost) <= 1
        assert index_shard(path, "full").failures  # also where the bit lies in a header or in padding
    path.write_bytes(content)


@pytest.mark.parametrize("count", COUNTS)
def test_without_a_manifest_truncations_and_headers(tmp_path, count):
    members = [(f"{i}.{e}", bytes([i]) * 700) for i in range(SAMPLES) for e in ("jpg", "txt")]
    content = write_tar(tmp_path / "t.tar", members).read_bytes()
    whole, path, rng = contents(tmp_path / "t.tar")[0], tmp_path / "t.tar", random.Random(3)
    end, header = len(members) * 1536, io.BytesIO(content).read(512)
    assert header == content[:512] and len(whole) == SAMPLES
    for i in range(2 * count):
        if i % 2:
            damaged = content[: rng.randrange(end + 512)]
        else:
            damaged = flipped(content, 8 * 1536 * rng.randrange(len(members)) + rng.randrange(8 * 512))
        path.write_bytes(damaged)
        used, _, complaints = contents(path)
        assert all(whole[key] == used_members for key, used_members in used.items())
        assert used.keys() == whole.keys() or complaints
