"""Kind 1: output that overlaps its input, and resuming by name."""

import os
import shutil

import pytest
import torch

from v2flow_cli.errors import DataError, ModelError
from v2flow_cli.jobs.encode import SetEncoder, encode_files
from v2flow_cli.jobs.shard import write_shards
from v2flow_cli.jobs.shard_sources import sources_from_sidecars
from v2flow_cli.recipe.load import dump_recipe, load_recipe
from v2flow_cli.store.find import find_images, find_tars
from v2flow_cli.store.shards import iterate_shard
from v2flow_cli.store.stream import SampleStream
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.training.checkpoint import load_newest, save_checkpoint
from v2flow_cli.training.resume import check_same_recipe

from ..conftest import RECIPES


def keys_in(out):
    return sorted(key for tar in find_tars([out]) for key, _, _ in iterate_shard(tar.path))


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


def stop_encode(picture, source, out, tokenizer, count, **options):
    """Encode ``source``, interrupted after ``count`` images."""
    left = [count]

    def tick(advance):
        left[0] -= advance
        if left[0] < 0:
            raise KeyboardInterrupt

    encoder = SetEncoder(V2FlowTokenizer.from_pretrained(tokenizer), batch_size=1, workers=1)
    with pytest.raises(KeyboardInterrupt):
        encode_files(encoder, find_images([source]), out, force=options.get("force", False), tick=tick)


def test_case_02_tokens_of_other_photos_of_the_same_names(v2flow, picture, tmp_path, tiny_tokenizer_folder):
    for i in range(8):
        picture(tmp_path / "A" / f"{i}.png", i)
        picture(tmp_path / "B" / f"{i}.png", 100 + i)
    stop_encode(picture, tmp_path / "A", tmp_path / "t", tiny_tokenizer_folder, 5)
    done = v2flow("encode", tmp_path / "B", "-o", tmp_path / "t")
    assert done.exit_code == 1 and "holds the tokens of another file of that name" in done.stderr
    done = v2flow("encode", tmp_path / "A", "-o", tmp_path / "t")
    assert done.exit_code == 0 and "finished earlier" in done.stdout
    v2flow("encode", tmp_path / "A", "-o", tmp_path / "whole")
    assert content(tmp_path / "t") == content(tmp_path / "whole")


def test_case_02_a_photo_that_was_replaced_by_one_of_the_same_size(v2flow, picture, tmp_path, tiny_tokenizer_folder):
    for i in range(4):
        picture(tmp_path / "A" / f"{i}.bmp", i)
    before = os.stat(tmp_path / "A" / "0.bmp")
    stop_encode(picture, tmp_path / "A", tmp_path / "t", tiny_tokenizer_folder, 2)
    picture(tmp_path / "A" / "0.bmp", 99)
    os.utime(tmp_path / "A" / "0.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(tmp_path / "A" / "0.bmp").st_size == before.st_size
    done = v2flow("encode", tmp_path / "A", "-o", tmp_path / "t")
    assert done.exit_code == 1 and "has changed since" in done.stderr
    assert v2flow("encode", tmp_path / "A", "-o", tmp_path / "t", "--force").exit_code == 0


def test_case_02_a_stopped_force_is_not_taken_for_finished(v2flow, picture, tmp_path, tiny_tokenizer_folder):
    """What the forced run has not come to yet are the tokens of the photos before."""
    for i in range(5):
        picture(tmp_path / "A" / f"{i}.png", i)
        picture(tmp_path / "B" / f"{i}.png", 100 + i)
    assert v2flow("encode", tmp_path / "A", "-o", tmp_path / "t").exit_code == 0
    stop_encode(picture, tmp_path / "B", tmp_path / "t", tiny_tokenizer_folder, 2, force=True)
    assert len(list((tmp_path / "t").glob("*.npy"))) == 5  # nothing is removed before its successor is there
    done = v2flow("decode", tmp_path / "t", "-o", tmp_path / "d")
    assert done.exit_code == 1 and "Repeat its command first" in done.stderr
    assert v2flow("encode", tmp_path / "B", "-o", tmp_path / "t").exit_code == 0
    v2flow("encode", tmp_path / "B", "-o", tmp_path / "whole")
    assert content(tmp_path / "t") == content(tmp_path / "whole")


def test_case_02_shards_that_have_changed_since(v2flow, picture, tmp_path):
    for name in "AB":
        picture(tmp_path / name / "1.png", name)
        assert v2flow("shard", tmp_path / name, "-o", tmp_path / f"s{name}").exit_code == 0
    assert v2flow("encode", tmp_path / "sA", "-o", tmp_path / "t").exit_code == 0
    again = v2flow("encode", tmp_path / "sA", "-o", tmp_path / "t")
    assert again.exit_code == 0 and "1 finished earlier" in again.stdout
    done = v2flow("encode", tmp_path / "sB", "-o", tmp_path / "t")
    assert done.exit_code == 1 and "holds the tokens of another file of that name" in done.stderr


def test_case_02_shard_continued_with_other_photos_of_the_same_names(picture, tmp_path):
    for i in range(6):
        picture(tmp_path / "A" / f"{i}.png", i)
        picture(tmp_path / "B" / f"{i}.png", 100 + i)
    left = [4]

    def tick(advance):
        left[0] -= advance
        if left[0] < 0:
            raise KeyboardInterrupt

    options = {"prefix": "s", "shard_bytes": 1}
    with pytest.raises(KeyboardInterrupt):
        write_shards(sources_from_sidecars(tmp_path / "A"), tmp_path / "s", **options, tick=tick)
    with pytest.raises(DataError, match="the images are not those of the stopped run"):
        write_shards(sources_from_sidecars(tmp_path / "B"), tmp_path / "s", **options)
    assert write_shards(sources_from_sidecars(tmp_path / "A"), tmp_path / "s", **options).kept_shards > 0


@pytest.mark.parametrize("name", ["manifest.json", "a.npy"])
def test_encode_overwrites_nothing_of_the_users(v2flow, picture, tmp_path, name):
    """Tokens beside their photos are fine, but a manifest of something else is never replaced."""
    picture(tmp_path / "p" / "a.png")
    (tmp_path / "p" / name).write_text('{"name": "my web app"}')
    for force in ([], ["--force"]) if name == "manifest.json" else ([],):
        done = v2flow("encode", tmp_path / "p", "-o", tmp_path / "p", *force)
        assert done.exit_code == 1 and "exists" in done.stderr
        assert content(tmp_path / "p").keys() == {"a.png", name}


def test_encode_does_not_replace_the_manifest_of_shards(v2flow, picture, tmp_path):
    picture(tmp_path / "p" / "a.png")
    v2flow("shard", tmp_path / "p", "-o", tmp_path / "s")
    before = content(tmp_path / "s")
    done = v2flow("encode", tmp_path / "s", "-o", tmp_path / "s", "--force")
    assert done.exit_code == 1 and "not the manifest of a set of tokens" in done.stderr
    assert content(tmp_path / "s") == before


def test_case_03_the_output_of_a_training_is_not_data(picture, tmp_path):
    picture(tmp_path / "m" / "a.png", 1)
    picture(tmp_path / "m" / "run" / "grids" / "step-1.png", 2)
    stream = SampleStream([str(tmp_path / "m")], seed=0, output=str(tmp_path / "m" / "run"))
    assert len(stream) == 1 and "it is the output" in stream.not_taken.lines()[0]
    os.symlink(tmp_path / "m" / "run", tmp_path / "link")
    assert len(SampleStream([str(tmp_path / "m")], seed=0, output=str(tmp_path / "link"))) == 1
    for same in (tmp_path / "m", f"{tmp_path}/m/", f"{tmp_path}/m/run/.."):
        with pytest.raises(DataError, match="the run's own output"):
            SampleStream([str(tmp_path / "m")], seed=0, output=str(same))


TINY = RECIPES / "tiny" / "autoencoder.yaml"


@pytest.mark.parametrize("now", ["m/", "{tmp}/m", "./m", "m/../m", "link"])
def test_case_04_the_same_folder_by_another_path_is_resumed(tmp_path, monkeypatch, now):
    (tmp_path / "m").mkdir()
    os.symlink("m", tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    before = dump_recipe(load_recipe(TINY, ["data.sources=[m]"]))
    check_same_recipe(tmp_path, before, dump_recipe(load_recipe(TINY, [f"data.sources=[{now.format(tmp=tmp_path)}]"])))


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("data.sources=[a,b]", "data.sources=[b,a]"),
        ("data.sources=[a,a,b]", "data.sources=[a,b]"),
        ("data.sources=[a]", "data.sources=[c]"),
        ("optimizer.betas=[0.9,0.95]", "optimizer.betas=[0.95,0.9]"),
    ],
)
def test_case_04_another_order_is_another_recipe(tmp_path, monkeypatch, before, now):
    for name in "abc":
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="the recipe is not that of this run"):
        check_same_recipe(tmp_path, *(dump_recipe(load_recipe(TINY, [change])) for change in (before, now)))


def test_a_copy_of_a_checkpoint_is_neither_dropped_nor_resumed(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"model": {"w": torch.ones(2)}}, {"step": step}, keep=1)
        if step == 1:
            shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000001-best")
    assert sorted(os.listdir(tmp_path)) == ["step-00000001-best", "step-00000003"]
    assert load_newest(tmp_path)[2] == {"step": 3}
