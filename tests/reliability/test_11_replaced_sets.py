"""11. A set of shards that --force replaces is lost at no moment: killed at every file operation, it is old or new."""

import random
import shutil
import signal
from functools import partial

import pytest
from PIL import Image

from tests.reliability.processes import content, fork, killed_at, wait
from v2flow_cli.errors import DataError
from v2flow_cli.jobs.encode import SetEncoder, encode_shards
from v2flow_cli.jobs.shard import write_shards
from v2flow_cli.jobs.shard_sources import sources_from_sidecars
from v2flow_cli.store.find import find_tars
from v2flow_cli.store.shard_index import REPLACING
from v2flow_cli.store.shards import index_shard, iterate_shard
from v2flow_cli.store.token_file import read_token_set
from v2flow_cli.tokenizer import V2FlowTokenizer

OLD, NEW = {"prefix": "s", "shard_bytes": 6_000}, {"prefix": "s", "shard_bytes": 14_000}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folders = []
    for name, count in (("old", 8), ("new", 6)):
        folder, rng = tmp_path_factory.mktemp(name), random.Random(name)
        for i in range(count):
            Image.frombytes("RGB", (16, 16), rng.randbytes(768)).save(folder / f"{name}{i}.png")
        folders.append(folder)
    return folders


def whole(out):
    """The keys of a set that passes a full check."""
    shards = [tar.path for tar in find_tars([out])]
    assert not [f for path in shards for f in index_shard(path, "full").failures]
    return {key for path in shards for key, _, _ in iterate_shard(path)}


@pytest.mark.parametrize("every", [pytest.param(9, id="every-9th"), pytest.param(1, id="all", marks=pytest.mark.slow)])
def test_killed_while_a_set_is_replaced(images, tmp_path, every):
    old, new = images
    write_shards(sources_from_sidecars(old), tmp_path / "old", **OLD)
    write_shards(sources_from_sidecars(new), tmp_path / "new", **NEW)
    before, after = content(tmp_path / "old"), content(tmp_path / "new")
    states = set()
    for number in range(1, 400, every):
        out = tmp_path / "out"
        shutil.copytree(tmp_path / "old", out)
        replace = partial(write_shards, sources_from_sidecars(new), out, **NEW, force=True)
        (code,) = wait([fork(partial(killed_at, number, out, replace))], 60)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        if (out / REPLACING).exists():  # readers refuse what is half old and half new
            states.add("moving")
            with pytest.raises(DataError, match="is replacing this one, or was interrupted"):
                find_tars([out])
        else:
            states.add("old" if {k: v for k, v in content(out).items() if "/" not in k} == before else "new")
            assert whole(out) in ({f"old{i}" for i in range(8)}, {f"new{i}" for i in range(6)})
        try:  # the repeated command, first as it was not forced: it goes on, or says that the old set is there
            write_shards(sources_from_sidecars(new), out, **NEW)
        except DataError as error:
            assert "exists already" in str(error)
            write_shards(sources_from_sidecars(new), out, **NEW, force=True)
        assert content(out) == after
        shutil.rmtree(out)
    assert code == 0 and states >= {"old", "moving"}


def test_a_replacement_that_was_interrupted_is_finished_before_another_one(images, tmp_path):
    """Also where the next command is a different one: the set that it replaces is whole until then."""
    old, new = images
    for number in range(2, 400, 13):
        out = tmp_path / str(number)
        write_shards(sources_from_sidecars(old), out, **OLD)
        replace = partial(write_shards, sources_from_sidecars(new), out, **NEW, force=True)
        (code,) = wait([fork(partial(killed_at, number, out, replace))], 60)
        if code == 0:
            break
        write_shards(sources_from_sidecars(old), out, **NEW, force=True)
        assert whole(out) == {f"old{i}" for i in range(8)} and not list(out.glob(".*"))
    assert code == 0


@pytest.mark.parametrize(
    "every", [pytest.param(11, id="every-11th"), pytest.param(1, id="all", marks=pytest.mark.slow)]
)
def test_killed_while_tokens_are_replaced(images, tmp_path, tiny_tokenizer_folder, every):
    """At any moment a token file belongs to its keys, and the repeated command ends as an undisturbed one."""
    encoder = SetEncoder(V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder), workers=1)
    for name, folder in zip(("old", "new"), images):
        write_shards(sources_from_sidecars(folder), tmp_path / f"{name}-tars", prefix="s", shard_bytes=4_500)

    def encode(name, out, force):
        encode_shards(encoder, find_tars([tmp_path / f"{name}-tars"])[:2], out, force=force, tick=lambda n: None)

    for name in ("old", "new"):
        encode(name, tmp_path / name, force=False)
    rows = {s.key: s.token_ids.tolist() for name in ("old", "new") for s in read_token_set(tmp_path / name)}
    after = content(tmp_path / "new")
    for number in range(1, 400, every):
        out = tmp_path / "out"
        shutil.copytree(tmp_path / "old", out)
        (code,) = wait([fork(partial(killed_at, number, out, partial(encode, "new", out, True)))], 60)
        assert all(rows[s.key] == s.token_ids.tolist() for s in read_token_set(out))
        if code == 0:
            break
        try:  # before the first file is touched it is still the finished old set, which a new one does not replace
            encode("new", out, force=False)
        except DataError as error:
            assert "Use another -o, or --force" in str(error)
            assert {k: v for k, v in content(out).items() if not k.startswith(".")} == content(tmp_path / "old")
            encode("new", out, force=True)
        assert content(out) == after
        shutil.rmtree(out)
    assert code == 0
