"""Kind 1: output that overlaps its input, and resuming by name."""

import os

import pytest

from v2flow_cli.store.shards import find_shards, iterate_shard


def keys_in(out):
    return sorted(key for tar in find_shards([out]) for key, _, _ in iterate_shard(tar))


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_case_01_shards_packed_into_their_own_folder(v2flow, picture, tmp_path):
    for i in range(40):
        picture(tmp_path / "p" / f"{i:02d}.png", i, side=40)
    assert v2flow("shard", tmp_path / "p", "-o", tmp_path / "s", "--shard-mb", "0.1").exit_code == 0
    before = content(tmp_path / "s")
    again = v2flow("shard", tmp_path / "s", "-o", tmp_path / "s", "--shard-mb", "0.05", "--force")
    assert again.exit_code == 1 and "the same folder as the input" in again.stderr
    assert content(tmp_path / "s") == before and len(keys_in(tmp_path / "s")) == 40


def test_case_01_a_photo_added_to_a_folder_that_holds_its_tars(v2flow, picture, tmp_path):
    picture(tmp_path / "k" / "1.png", 1)
    done = v2flow("shard", tmp_path / "k", "-o", tmp_path / "k")
    assert done.exit_code == 1 and "the same folder as the input" in done.stderr
    assert content(tmp_path / "k").keys() == {"1.png"}


@pytest.mark.parametrize("other", ["{k}/", "{k}/../k", "relative", "link", "tar"])
def test_case_01_the_same_folder_by_another_path(v2flow, picture, tmp_path, monkeypatch, other):
    picture(tmp_path / "p" / "1.png", 1)
    assert v2flow("shard", tmp_path / "p", "-o", tmp_path / "k").exit_code == 0
    before = content(tmp_path / "k")
    monkeypatch.chdir(tmp_path)
    os.symlink("k", "link")
    source, out = tmp_path / "k", {"relative": "k", "link": "link"}.get(other, other.format(k=tmp_path / "k"))
    if other == "tar":
        source, out = tmp_path / "k" / "shard-000000.tar", tmp_path / "k"
    done = v2flow("shard", source, "-o", out, "--force")
    assert done.exit_code == 1 and "the same folder as the input" in done.stderr
    assert content(tmp_path / "k") == before


def test_case_01_links_to_tars_are_replaced_and_not_what_they_lead_to(v2flow, picture, tmp_path):
    for name in "ab":
        picture(tmp_path / "p" / f"{name}.png", name)
    assert v2flow("shard", tmp_path / "p", "-o", tmp_path / "s").exit_code == 0
    before = content(tmp_path / "s")
    (tmp_path / "t").mkdir()
    os.link(tmp_path / "s" / "shard-000000.tar", tmp_path / "t" / "shard-000000.tar")
    os.symlink(tmp_path / "s" / "shard-000001.tar", tmp_path / "t" / "shard-000001.tar")
    assert v2flow("shard", tmp_path / "s", "-o", tmp_path / "t", "--force").exit_code == 0
    assert content(tmp_path / "s") == before and keys_in(tmp_path / "t") == ["shard-000000/a", "shard-000000/b"]


@pytest.mark.parametrize("name", ["shard-backup.tar", "shard-old-000000.tar", "shard-1.tar"])
def test_case_01_force_removes_no_tar_of_another_name(v2flow, picture, tmp_path, name):
    picture(tmp_path / "p" / "1.png", 1)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / name).write_bytes(b"the user's own")
    for force in ([], ["--force"]):
        assert v2flow("shard", tmp_path / "p", "-o", tmp_path / "s", *force).exit_code == 0
        assert (tmp_path / "s" / name).read_bytes() == b"the user's own"


@pytest.mark.parametrize("text", ['{"name": "my web app"}', '{"format": "v2flow-tokens", "files": {}}', "no json"])
def test_case_01_a_manifest_of_something_else_is_not_overwritten(v2flow, picture, tmp_path, text):
    picture(tmp_path / "p" / "1.png", 1)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "manifest.json").write_text(text)
    for force in ([], ["--force"]):
        done = v2flow("shard", tmp_path / "p", "-o", tmp_path / "s", *force)
        assert done.exit_code == 1 and "is not the manifest of a set of shards" in done.stderr
        assert content(tmp_path / "s") == {"manifest.json": text.encode()}


def test_case_01_the_manifest_of_another_prefix_is_not_overwritten(v2flow, picture, tmp_path):
    picture(tmp_path / "p" / "1.png", 1)
    assert v2flow("shard", tmp_path / "p", "-o", tmp_path / "s", "--prefix", "train").exit_code == 0
    before = content(tmp_path / "s")
    done = v2flow("shard", tmp_path / "p", "-o", tmp_path / "s", "--prefix", "val", "--force")
    assert done.exit_code == 1 and "another set than --prefix val" in done.stderr
    assert content(tmp_path / "s") == before
