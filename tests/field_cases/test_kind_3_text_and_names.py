"""Kind 3: encodings, line ends, names."""

import codecs
import json
import os
import sys
import unicodedata

import pytest

from v2flow_cli.cli.generate import read_prompts
from v2flow_cli.errors import DataError
from v2flow_cli.jobs.generate import plan_pictures
from v2flow_cli.jobs.shard_sources import sources_from_sidecars, sources_from_table
from v2flow_cli.llm.sequences import caption_ids
from v2flow_cli.recipe.load import load_recipe
from v2flow_cli.store.failures import Failure, load_failures, save_failures
from v2flow_cli.store.find import find_images
from v2flow_cli.store.tables import read_caption_table, read_class_names
from v2flow_cli.store.token_file import load_samples, save_samples
from v2flow_cli.training.objectives.language_model import read_documents

from ..conftest import RECIPES

NO_LINE_ENDS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]


def captions_of(folder):
    return [source.captions for source in sources_from_sidecars(folder)]


@pytest.mark.parametrize("end", NO_LINE_ENDS)
def test_case_11_only_line_ends_end_lines(picture, tmp_path, end):
    picture(tmp_path / "p" / "a.png")
    (tmp_path / "p" / "a.txt").write_bytes(f"a{end}fox\na cat\r\n".encode())
    assert captions_of(tmp_path / "p") == [(f"a{end}fox", "a cat")]
    (tmp_path / "t.jsonl").write_text(json.dumps({"file": "a.png", "text": f"a{end}fox"}, ensure_ascii=False) + "\n")
    assert list(read_caption_table(tmp_path / "t.jsonl")) == [(1, "a.png", ["a fox"])]
    (tmp_path / "t.csv").write_bytes(f'file,caption\na.png,"a{end}fox"\n'.encode())
    assert list(read_caption_table(tmp_path / "t.csv")) == [(2, "a.png", ["a fox"])]
    (tmp_path / "prompts.txt").write_bytes(f"a{end}fox\r\n\r\na cat".encode())
    assert read_prompts(tmp_path / "prompts.txt") == ["a fox", "a cat"]
    (tmp_path / "names.txt").write_bytes(f"n1 red{end}fox\nn2 cat\n".encode())
    assert read_class_names(tmp_path / "names.txt").keys() == {"n1", "n2"}


@pytest.mark.parametrize("end", NO_LINE_ENDS)
def test_case_11_our_own_json_lines(tmp_path, end):
    save_samples(tmp_path / "x.npy", [(f"a{end}b", (f"a{end}fox",)), ("c", ())])
    assert load_samples(tmp_path / "x.npy") == [(f"a{end}b", (f"a{end}fox",)), ("c", ())]
    failures = [Failure(f"a{end}b.tar", f"bad{end}file", "key"), Failure("c", "why")]
    save_failures(tmp_path / "bad.jsonl", failures)
    assert load_failures(tmp_path / "bad.jsonl") == failures


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_case_12_byte_order_marks_in_every_reader(picture, tmp_path, encoding):
    picture(tmp_path / "p" / "a.png")
    (tmp_path / "p" / "a.txt").write_bytes("a größer fox\na cat".encode(encoding))
    assert captions_of(tmp_path / "p") == [("a größer fox", "a cat")]
    (tmp_path / "names.txt").write_bytes("n1 größer fox, x\n".encode(encoding))
    assert read_class_names(tmp_path / "names.txt") == {"n1": "größer fox"}
    (tmp_path / "prompts.txt").write_bytes("größer\nfox\n".encode(encoding))
    assert read_prompts(tmp_path / "prompts.txt") == ["größer", "fox"]
    (tmp_path / "t.csv").write_bytes("File;Caption\na.png;größer\n".encode(encoding))
    assert list(read_caption_table(tmp_path / "t.csv")) == [(2, "a.png", ["größer"])]
    (tmp_path / "t.jsonl").write_bytes('{"file": "a.png", "text": "größer"}\n'.encode(encoding))
    assert list(read_caption_table(tmp_path / "t.jsonl")) == [(1, "a.png", ["größer"])]
    (tmp_path / "text.txt").write_bytes("größer\nfox\n".encode(encoding))
    assert list(read_documents([tmp_path / "text.txt"])) == ["größer", "fox"]
    if encoding != "utf-32":  # YAML has no UTF-32
        text = (RECIPES / "tiny" / "autoencoder.yaml").read_text()
        (tmp_path / "r.yaml").write_bytes(text.encode(encoding))
        assert load_recipe(tmp_path / "r.yaml") == load_recipe(RECIPES / "tiny" / "autoencoder.yaml")


def test_case_12_files_that_were_joined(picture, tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"one\n" + codecs.BOM_UTF8 + b"two\n")
    assert captions_of(tmp_path) == [("one", "two")]


@pytest.mark.parametrize("command", ["encode", "shard", "bench"])
def test_case_13_names_that_are_not_utf8(v2flow, picture, tmp_path, command):
    folder = tmp_path / "p"
    for i, name in enumerate([b"caf\xe9.png", b"caf\xe8.png", "café.png".encode()]):
        os.rename(picture(folder / f"{i}.png", i), os.fsencode(folder) + b"/" + name)
    with open(os.fsencode(folder) + b"/bad\xe9.png", "wb") as file:
        file.write(b"no image")
    more = {"bench": ["--no-speed", "--no-codecs", "--no-fid", "--images-csv", tmp_path / "i.csv"]}
    done = v2flow(command, folder, *more.get(command, ["-o", tmp_path / "o"]), "--json")
    assert done.exit_code == 1 and "bad\\xe9.png" in done.stderr  # one bad image of four
    assert len(json.loads(done.stdout)["failed"]) == 1
    if command == "encode":
        assert len(json.loads((tmp_path / "o" / "manifest.json").read_text())["files"]) == 3
        assert v2flow("decode", tmp_path / "o", "-o", tmp_path / "d").exit_code == 0
        assert len(list((tmp_path / "d").glob("*.png"))) == 3


@pytest.mark.parametrize("length", [200, 236, 240, 251])
def test_case_14_long_names(v2flow, picture, tmp_path, length):
    picture(tmp_path / "p" / "short.png")
    for i, letter in enumerate("ab"):
        picture(tmp_path / "p" / f"{letter * length}.png", i)
    done = v2flow("encode", tmp_path / "p", "-o", tmp_path / "t", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["images"] == 3
    assert v2flow("decode", tmp_path / "t", "-o", tmp_path / "d").exit_code == 0
    assert v2flow("shard", tmp_path / "p", "-o", tmp_path / "s").exit_code == 0
    assert len(list((tmp_path / "d").glob("*.png"))) == 3 and not list((tmp_path / "d").glob(".*"))


def test_case_14_a_name_that_cannot_be_written_costs_one_image(v2flow, picture, tmp_path):
    """A file system may take shorter paths than the one the image lies on; here, a folder is in the way."""
    picture(tmp_path / "p" / "a.png", 1)
    picture(tmp_path / "p" / "b.png", 2)
    (tmp_path / "t" / "a.npy" / "x").mkdir(parents=True)
    done = v2flow("encode", tmp_path / "p", "-o", tmp_path / "t", "--json", "--force")
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and found["images"] == 1 and "a.npy: cannot be written" in found["failed"][0]["reason"]


def test_case_15_names_that_contain_a_suffix(v2flow, picture, tmp_path):
    for i, name in enumerate(["a.jpg", "a.png", "a.jpg.webp", "b.PNG", "b.png", "c.tar.png"]):
        picture(tmp_path / "p" / name, i)
    keys = [file.key for file in find_images([tmp_path / "p"])]
    assert keys == ["a.jpg", "a.jpg.webp", "a.png", "b.PNG", "b.png", "c.tar"]
    done = v2flow("encode", tmp_path / "p", "-o", tmp_path / "t")
    assert done.exit_code == 0 and "6 images" in done.stdout
    assert v2flow("decode", tmp_path / "t", "-o", tmp_path / "d").exit_code == 0
    assert len(list((tmp_path / "d").glob("*.png"))) == 6


def test_case_16_a_prompt_with_bytes_that_are_not_utf8():
    class Words:
        def __call__(self, text, **options):
            text.encode()  # what a real tokenizer needs
            return {"input_ids": [len(text)]}

    prompt = os.fsdecode(b"caf\xe9")
    assert plan_pictures([prompt], [0], [1.0])[0].prompt == "caf\\xe9"
    assert caption_ids(Words(), prompt) == [len("caf\\xe9")]
    assert caption_ids(Words(), "lone \ud83d") == [len("lone \\ud83d")]


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("t.csv", "file;caption\na.png;a fox\n"),
        ("t.csv", "file, caption\na.png, a fox\n"),
        ("t.csv", "File,Caption\na.png,a fox\n"),
        ("t.csv", '"FILE"\t"TEXT"\na.png\ta fox\n'),
        ("t.tsv", "file_name\tprompt\na.png\ta fox\n"),
        ("t.CSV", 'caption, file\n"a fox", "a.png"\n'),
        ("t.jsonl", '{"File": "a.png", " Caption": "a fox"}\n'),
    ],
)
def test_case_17_headers_as_people_write_them(tmp_path, name, table):
    (tmp_path / name).write_text(table)
    assert [row[1:] for row in read_caption_table(tmp_path / name)] == [("a.png", ["a fox"])]


@pytest.mark.parametrize("table", ["bild,text_de\na.png,x\n", "a.png,a fox\n", "file|caption\na.png|x\n"])
def test_case_17_a_header_that_is_not_known_is_shown(tmp_path, table):
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(DataError) as error:
        list(read_caption_table(tmp_path / "t.csv"))
    assert table.split("\n")[0] in str(error.value) and "file, image, path" in str(error.value)


@pytest.mark.parametrize(("disk", "listed"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_case_17_accents_composed_or_not(picture, tmp_path, disk, listed):
    picture(tmp_path / "p" / unicodedata.normalize(disk, "café/é.png"))
    (tmp_path / "t.csv").write_text("file,caption\n" + unicodedata.normalize(listed, "café/é.png") + ",a fox\n")
    failures = []
    (source,) = sources_from_table(tmp_path / "p", tmp_path / "t.csv", failures)
    assert source.captions == ("a fox",) and not failures


@pytest.mark.parametrize("name", [r"sub\a.png", "./sub/a.png", "sub//a.png", "{folder}/sub/a.png", "p/sub/a.png"])
def test_case_17_paths_as_people_write_them(picture, tmp_path, name):
    picture(tmp_path / "p" / "sub" / "a.png")
    row = {"file": name.format(folder=tmp_path / "p"), "caption": "a fox"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    failures = []
    (source,) = sources_from_table(tmp_path / "p", tmp_path / "t.jsonl", failures)
    assert source.captions == ("a fox",) and not failures


def test_prompts_on_stdin_follow_the_same_rule(monkeypatch, tmp_path):
    (tmp_path / "in").write_bytes("a\u2028fox\r\ngrößer".encode("utf-16"))
    with open(tmp_path / "in") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert read_prompts("-") == ["a fox", "größer"]


def test_case_23_home_folders(monkeypatch, picture, tmp_path, v2flow):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe(RECIPES / "tiny" / "autoencoder.yaml", ["output=~/runs/ae", "data.sources=[~/p]"])
    assert recipe.output == str(tmp_path / "runs" / "ae")
    assert recipe.data.sources == (str(tmp_path / "p"),)
    picture(tmp_path / "p" / "a.png")
    monkeypatch.chdir(tmp_path)
    assert v2flow("encode", "~/p", "-o", "~/t").exit_code == 0
    assert v2flow("shard", "~/p", "-o", "~/s").exit_code == 0
    assert v2flow("decode", "~/t", "-o", "~/d/").exit_code == 0
    assert sorted(os.listdir(tmp_path)) == ["d", "p", "s", "t"]


def test_case_28_a_file_name_for_one_picture(v2flow, picture, tmp_path):
    picture(tmp_path / "p" / "a.png", 1)
    assert v2flow("encode", tmp_path / "p", "-o", tmp_path / "t").exit_code == 0
    done = v2flow("decode", tmp_path / "t", "-o", tmp_path / "fox.png")
    assert done.exit_code == 0 and (tmp_path / "fox.png").is_file()
    again = v2flow("decode", tmp_path / "t", "-o", tmp_path / "fox.png")
    assert again.exit_code == 1 and "exists already" in again.stderr
    picture(tmp_path / "p" / "b.png", 2)
    assert v2flow("encode", tmp_path / "p", "-o", tmp_path / "u").exit_code == 0
    done = v2flow("decode", tmp_path / "u", "-o", tmp_path / "two.png")
    assert done.exit_code == 1 and "the name of one picture, but there are 2" in done.stderr
    assert not (tmp_path / "two.png").exists()


@pytest.mark.parametrize("command", ["encode", "shard", "decode", "generate"])
def test_case_28_no_folder_is_made_under_the_name_of_a_file(v2flow, picture, tmp_path, command):
    picture(tmp_path / "p" / "a.png", 1)
    (tmp_path / "p" / "a.npy").touch()
    words = ["a fox"] if command == "generate" else [tmp_path / "p"]
    name = {"encode": "x.npy", "shard": "x.tar"}.get(command, "x.jpg")
    done = v2flow(command, *words, "-o", tmp_path / name)
    assert done.exit_code == 1 and "the name of a file; expected a folder" in done.stderr
    assert not (tmp_path / name).exists()
