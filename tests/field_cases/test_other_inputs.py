"""Inputs of the same kinds as the field cases."""

import io
import json
import tarfile

import pytest

from v2flow_cli.errors import ModelError, V2FlowError
from v2flow_cli.recipe.load import load_recipe
from v2flow_cli.runtime.hub import model_folder
from v2flow_cli.store.captions import read_captions
from v2flow_cli.store.not_taken import NotTaken
from v2flow_cli.store.text import decode_text, lines_of

from ..conftest import RECIPES

NO_TEXT = "captions with bytes that are no text"


def captions_of(folder):
    return {
        path.name.split(".")[0]: json.loads(path.read_text())["captions"] for path in folder.glob("*.samples.jsonl")
    }


@pytest.mark.parametrize(
    ("content", "captions", "counted"),
    [
        ("a cat\na dog\n".encode("utf-16-le"), ("a cat", "a dog"), False),
        ("a cat\né\n".encode("utf-16-be"), ("a cat", "é"), False),
        ("a cat\n\ufeffa \ufeffdog\n".encode(), ("a cat", "a dog"), False),
        (b"caf\xe9\n", ("caf\ufffd",), True),
        (b"a\0b\n", ("a\0b",), True),
        ("赤い狐".encode("utf-16-le"), None, True),
        ("лиса на снегу\n".encode("utf-16-le"), None, True),
        ("caf\ufffd".encode(), ("caf\ufffd",), False),  # the character itself, as another program wrote it
        (b"", (), False),
    ],
)
def test_captions_that_are_no_text_are_counted(content, captions, counted):
    not_taken = NotTaken()
    found = read_captions(content, "a.txt", not_taken)
    assert captions is None or found == captions
    assert [kind for kind, _ in not_taken.groups] == [NO_TEXT] * counted


def test_they_are_listed_by_encode_and_shard(picture, v2flow, tmp_path):
    for name, content in {"good": b"a cat\n", "latin": b"caf\xe9\n", "utf16": "a fox\n".encode("utf-16-le")}.items():
        picture(tmp_path / f"in/{name}.png", 1)
        (tmp_path / f"in/{name}.txt").write_bytes(content)
    done = v2flow("encode", tmp_path / "in", "-o", tmp_path / "t", "--json")
    (group,) = json.loads(done.stdout)["not_taken"]
    assert (group["kind"], group["names"]) == (NO_TEXT, [str(tmp_path / "in/latin.txt")])
    assert captions_of(tmp_path / "t") == {"good": ["a cat"], "latin": ["caf\ufffd"], "utf16": ["a fox"]}
    done = v2flow("shard", tmp_path / "in", "-o", tmp_path / "s")
    assert f"not taken: 1 caption{NO_TEXT[8:]} ({tmp_path}/in/latin.txt)" in done.stderr
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        tar.add(tmp_path / "in", arcname=".")
    for command in ("encode", "shard"):
        done = v2flow(command, tmp_path / "in.tar", "-o", tmp_path / f"{command}ed")
        assert f"not taken: 1 caption{NO_TEXT[8:]} ({tmp_path}/in.tar/" in done.stderr


def test_prompts_in_utf_16_without_a_mark():
    assert lines_of(decode_text("a fox\na dog\n".encode("utf-16-le"), "p.txt")) == ["a fox", "a dog"]


def test_an_unknown_user_is_told(picture, v2flow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "in/a.png")
    for arguments in (("encode", "~nobody-here/x", "-o", "t"), ("encode", "in", "-o", "~nobody-here/x")):
        done = v2flow(*arguments)
        assert (
            done.exit_code == 1
            and "~nobody-here/x: there is no user nobody-here. Write ./~nobody-here/x" in done.stderr
        )
    with pytest.raises(ModelError, match="no such folder"):
        model_folder("~nobody-here/models/x")
    with pytest.raises(V2FlowError, match="no such recipe"):
        load_recipe("~nobody-here/a.yaml")
    sources = "data.sources=[~nobody-here/x]"
    done = v2flow("train", RECIPES / "tiny/autoencoder.yaml", "--dry-run", "--set", sources, "--set", "output=out")
    assert done.exit_code == 1 and "there is no user nobody-here" in done.stderr
    picture(tmp_path / "~b.png")
    assert v2flow("encode", "~b.png", "-o", "t").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "t", "~b.png"]


def test_an_output_below_a_file_is_told(picture, v2flow, tmp_path):
    place = picture(tmp_path / "in/a.png")
    done = v2flow("encode", tmp_path / "in", "-o", place / "x" / "y")
    assert done.exit_code == 1 and f"-o {place}/x/y: {place} is a file; expected a folder to make it in." in done.stderr


def test_a_prefix_that_cannot_be_printed_is_refused(picture, v2flow, tmp_path):
    picture(tmp_path / "in/a.png")
    done = v2flow("shard", tmp_path / "in", "-o", tmp_path / "s", "--prefix", "a\n")
    assert done.exit_code == 2 and not (tmp_path / "s").exists()


def test_a_table_without_rows_is_told(picture, v2flow, tmp_path):
    picture(tmp_path / "in/a.png")
    table = tmp_path / "t.csv"
    table.write_text("file,caption\n")
    done = v2flow("shard", tmp_path / "in", "-o", tmp_path / "s", "--captions", table)
    assert done.exit_code == 1 and f"error: {table}: no row below the header" in done.stderr


def test_samples_of_a_tar_whose_cleaned_names_are_equal(picture, v2flow, tmp_path):
    """``x:1`` and ``x?1`` are two samples of a tar, and stay two in the one that is made of it."""
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for i, name in enumerate(("x:1.png", "x?1.png", "X:1.png")):
            content = picture(tmp_path / "p.png", i).read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert v2flow("shard", tmp_path / "in.tar", "-o", tmp_path / "s").exit_code == 0
    done = v2flow("encode", tmp_path / "s", "-o", tmp_path / "t", "--json")
    assert json.loads(done.stdout)["images"] == 3 and json.loads(done.stdout)["failed"] == []


def test_a_tar_without_an_image_is_a_failure(v2flow, tmp_path):
    with tarfile.open(tmp_path / "in.tar", "w"):
        pass
    for command in ("encode", "shard"):
        done = v2flow(command, tmp_path / "in.tar", "-o", tmp_path / command)
        assert done.exit_code == 1 and "in.tar: no image" in done.stderr


def test_a_member_that_is_no_json_is_listed(picture, v2flow, tmp_path):
    picture(tmp_path / "in/a.png")
    (tmp_path / "in/a.json").write_bytes(b"\xff\xfe{")
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        tar.add(tmp_path / "in", arcname=".")
    done = v2flow("encode", tmp_path / "in.tar", "-o", tmp_path / "t")
    assert done.exit_code == 0 and "a.json): not JSON, so without a caption" in done.stderr


def test_a_gzipped_tar_that_is_cut_at_once_is_told(picture, v2flow, tmp_path):
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        tar.add(picture(tmp_path / "a.png"), arcname="a.png")
    (tmp_path / "a.tgz").write_bytes((tmp_path / "a.tgz").read_bytes()[:30])
    done = v2flow("encode", tmp_path / "a.tgz", "-o", tmp_path / "t")
    assert done.exit_code == 1 and "a.tgz: not a complete tar" in done.stderr


def test_half_of_a_character_in_a_path_is_told(v2flow):
    done = v2flow("train", RECIPES / "tiny/autoencoder.yaml", "--dry-run", "--set", 'data.sources=["a\\ud800"]')
    assert done.exit_code == 1 and "a\\ud800: no name of a file; it holds half of a character" in done.stderr
