"""``v2flow shard`` through Typer's runner."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from v2flow_cli.cli.app import app
from v2flow_cli.store.shards import iterate_shard


def run(*args):
    return CliRunner().invoke(app, ["shard", *map(str, args)])


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        path = tmp_path / "src" / "red_fox" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (i, i, i)).save(path)
    (tmp_path / "src" / "red_fox" / "1.txt").write_text("one\ntwo\n")
    return tmp_path / "src"


def captions_in(out):
    return [captions for tar in sorted(out.glob("*.tar")) for _, _, captions in iterate_shard(tar)]


def test_sidecars(folder, tmp_path):
    done = run(folder, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "3 images, 2 captions in 1 shards" in done.stdout
    assert captions_in(tmp_path / "out") == [(), ("one", "two"), ()]


def test_class_folders_and_json(folder, tmp_path):
    done = run(folder, "-o", tmp_path / "out", "--captions", "classes", "--shard-mb", "0.002", "--json")
    assert done.exit_code == 0, done.stderr
    figures = json.loads(done.stdout)
    assert (figures["samples"], figures["captions"], figures["shards"], figures["failed"]) == (3, 3, 3, [])
    assert captions_in(tmp_path / "out") == [("a photo of red fox",)] * 3


def test_table(folder, tmp_path):
    (tmp_path / "t.csv").write_text("file,caption\nred_fox/2.png,a fox\nlost.png,gone\n")
    done = run(folder, "-o", tmp_path / "out", "--captions", tmp_path / "t.csv", "--res", "20", "--prefix", "fox")
    assert done.exit_code == 1
    assert "lost.png: listed in" in done.stderr
    assert captions_in(tmp_path / "out") == [("a fox",)]
    assert (tmp_path / "out" / "fox-000000.tar").exists()


def test_bad_images_are_listed_and_the_rest_kept(folder, tmp_path):
    (folder / "bad.jpg").write_text("text")
    done = run(folder, "-o", tmp_path / "out", "--json")
    assert done.exit_code == 1
    (failed,) = json.loads(done.stdout)["failed"]
    assert failed["source"].endswith("bad.jpg")
    assert "bad.jpg: not an image" in done.stderr and "Traceback" not in done.output
    assert len(captions_in(tmp_path / "out")) == 3


def test_existing_shards_need_force(folder, tmp_path):
    assert run(folder, "-o", tmp_path / "out").exit_code == 0
    again = run(folder, "-o", tmp_path / "out")
    assert again.exit_code == 1 and "exists already. Use --force" in again.stderr
    assert run(folder, "-o", tmp_path / "out", "--force").exit_code == 0


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["none"], 1, "no such file or folder"),
        (["empty"], 1, "no images in it"),
        (["src", "--captions", "none.csv"], 1, "cannot be read"),
        (["src", "--captions", "words"], 2, "expected sidecars, classes"),
        (["src", "--prefix", "../x"], 2, "without dots or slashes"),
        (["src", "--shard-mb", "0"], 2, "--shard-mb"),
    ],
)
def test_bad_arguments(folder, tmp_path, args, code, message):
    (tmp_path / "empty").mkdir()
    done = run(tmp_path / args[0], "-o", tmp_path / "out", *args[1:])
    assert done.exit_code == code
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
