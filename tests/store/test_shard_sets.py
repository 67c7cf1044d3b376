"""Sets of shards: stopped and resumed, checked against their manifest, and packed from other tars."""

import json

import pytest

from tests.store.test_shards import save_image, write_tar
from v2flow_cli.errors import DataError
from v2flow_cli.jobs.shard import write_shards
from v2flow_cli.jobs.shard_sources import sources_from_classes, sources_from_sidecars
from v2flow_cli.jobs.shard_sources import sources_from_tars as from_tars
from v2flow_cli.store import shard_index
from v2flow_cli.store.failures import Failure, over_budget
from v2flow_cli.store.find import find_tars
from v2flow_cli.store.shards import index_shard, iterate_shard
from v2flow_cli.store.tables import read_class_names


@pytest.fixture
def folder(tmp_path):
    for i in range(9):
        save_image(tmp_path / "src" / f"{i}.png", (i, i, i))
    (tmp_path / "src" / "4.png").write_text("no image")
    return tmp_path / "src"


def content(out):
    return {p.name: p.read_bytes() for p in out.iterdir()}


def stop_after(count):
    left = [count]

    def tick(advance):
        left[0] -= advance
        if left[0] < 0:
            raise KeyboardInterrupt

    return tick


@pytest.mark.parametrize(("seen", "kept"), [(0, 0), (1, 0), (3, 1), (5, 1), (8, 3)])
def test_a_stopped_run_resumes_to_the_same_result(folder, tmp_path, seen, kept):
    options = {"prefix": "s", "shard_bytes": 2100}
    whole = write_shards(sources_from_sidecars(folder), tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        write_shards(sources_from_sidecars(folder), tmp_path / "out", **options, tick=stop_after(seen))
    again = write_shards(sources_from_sidecars(folder), tmp_path / "out", **options)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert again.failures == whole.failures and again.kept_shards == kept


def test_a_stopped_run_is_not_continued_with_other_options_or_images(folder, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_shards(sources_from_sidecars(folder), tmp_path / "o", prefix="s", shard_bytes=2100, tick=stop_after(6))
    with pytest.raises(DataError, match="a stopped run with the options"):
        write_shards(sources_from_sidecars(folder), tmp_path / "o", prefix="s", shard_bytes=9000)
    (folder / "0.png").unlink()
    with pytest.raises(DataError, match="the images are not those"):
        write_shards(sources_from_sidecars(folder), tmp_path / "o", prefix="s", shard_bytes=2100)
    write_shards(sources_from_sidecars(folder), tmp_path / "o", prefix="s", shard_bytes=9000, force=True)


def test_a_missing_shard_is_reported_by_name(folder, tmp_path):
    write_shards(sources_from_sidecars(folder), tmp_path / "o", prefix="s", shard_bytes=2100)
    (tmp_path / "o" / "s-000001.tar").unlink()
    gone = [index_shard(tar.path) for tar in find_tars([tmp_path / "o"])][1]
    assert not gone.samples and [f.key for f in gone.failures] == ["2", "3"]


def test_a_damaged_shard_without_index_is_counted(folder, tmp_path):
    write_shards(sources_from_sidecars(folder), tmp_path / "o", prefix="s", shard_bytes=9000)
    path = tmp_path / "o" / "s-000000.tar"
    shard_index.index_path(path).unlink()
    assert not index_shard(path, "full").failures
    path.write_bytes(path.read_bytes()[:3500])
    index = index_shard(path)
    assert sum(f.samples for f in index.failures) + len(index.samples) == 8


@pytest.mark.parametrize(
    "change", ["[]", '{"format_version": 9}', '{"shards": 1}', '{"samples": 3}', '{"shards": [{}]}']
)
def test_damaged_manifests(folder, tmp_path, change):
    write_shards(sources_from_sidecars(folder), tmp_path / "o", prefix="s", shard_bytes=9000)
    path = tmp_path / "o" / "manifest.json"
    record, change = json.loads(path.read_text()), json.loads(change)
    path.write_text(json.dumps({**record, **change} if change else change))
    if not change:  # somebody else's file of that name
        assert index_shard(tmp_path / "o" / "s-000000.tar").samples
        return
    with pytest.raises(DataError, match=r"manifest\.json"):
        index_shard(tmp_path / "o" / "s-000000.tar")


def test_tars_are_repacked_with_their_captions(folder, tmp_path):
    image = (folder / "1.png").read_bytes()
    (tmp_path / "in").mkdir()
    json_caption = json.dumps({"prompt": "a  red\nfox", "img_path": "x"}).encode()
    members = [("a.png", image), ("a.txt", b"one"), ("a.json", b"{}"), ("b.png", image), ("b.json", json_caption)]
    write_tar(tmp_path / "in" / "00000.tar", [*members, ("../../c.png", image), ("d.png", b"bad")])
    failures: list = []
    write_shards(from_tars(tmp_path / "in", failures), tmp_path / "o", prefix="s", shard_bytes=10**6)
    found = {key: captions for key, _, captions in iterate_shard(tmp_path / "o" / "s-000000.tar")}
    assert found == {"00000/a": ("one",), "00000/b": ("a red fox",), "00000/c": ()}


def test_dangerous_keys_of_a_tar_are_made_safe_or_named(tmp_path):
    names = ["/etc/x.jpg", "../up.jpg", "Cat.jpg", "cat.jpg", f"{'k' * 300}.jpg", ".jpg", "._mac.jpg", "a\nb.jpg"]
    index = index_shard(write_tar(tmp_path / "t.tar", [(name, b"x") for name in names]))
    keys = [sample.key for sample in index.samples]
    assert keys[:4] == ["etc/x", "up", "Cat", "cat-2"] and keys[5] == "a_b" and len(keys) == 6
    assert len(keys[4]) <= 200
    (failure,) = index.failures
    assert "empty key" in failure.reason


def test_class_names(tmp_path):
    save_image(tmp_path / "imgs" / "n02119022" / "1.png")
    save_image(tmp_path / "imgs" / "sea_lion" / "2.png")
    (tmp_path / "names.txt").write_text("n02119022 red fox, Vulpes vulpes\n\nn1 other\n")
    names = read_class_names(tmp_path / "names.txt")
    captions = [s.captions for s in sources_from_classes(tmp_path / "imgs", names)]
    assert captions == [("a photo of red fox",), ("a photo of sea lion",)]
    (tmp_path / "names.txt").write_text("alone\n")
    with pytest.raises(DataError, match="line 1 is 'alone'"):
        read_class_names(tmp_path / "names.txt")


def test_the_error_budget():
    bad = [Failure("t.tar", "why", key) for key in "ab"]
    assert not over_budget(bad, 1998, 0.001) and over_budget(bad, 1997, 0.001)
    assert not over_budget([Failure("t.tar", "padding", samples=0)], 1, 0.0)
    assert over_budget([Failure("t.tar", "cut", samples=None)], 10**9, 0.001)
