"""Kind 2: what is not taken is counted and named, and a table is read whole or not at all."""

import gzip
import io
import json
import os
import tarfile
from types import SimpleNamespace

import pytest
from PIL import Image

from v2flow_cli.errors import DataError
from v2flow_cli.jobs.shard_sources import sources_from_classes, sources_from_table
from v2flow_cli.llm.pairs import log_data
from v2flow_cli.store.find import find_images, find_inputs
from v2flow_cli.store.not_taken import NotTaken
from v2flow_cli.store.shards import index_shard, iterate_shard
from v2flow_cli.store.stream import SampleStream
from v2flow_cli.store.tables import read_caption_table
from v2flow_cli.store.token_file import load_samples, read_token_set


def png(colour="teal"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_case_05_images_whose_names_have_dots_are_listed_one_by_one(v2flow, tmp_path):
    write_tar(tmp_path / "t" / "a.tar", [(f"22.0{i}.png", png()) for i in (5, 6, 7)])
    done = v2flow("encode", tmp_path / "t", "-o", tmp_path / "o", "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and found["images"] == 1
    assert [f["key"] for f in found["failed"]] == ["22", "22"]
    assert "22.06.png has the key of 22.05.png" in done.stderr and "22.07.png" in done.stderr


def test_case_05_masks_beside_an_image_are_counted_and_cost_nothing(tmp_path):
    members = [("1.jpg", png()), ("1.seg.png", png()), ("1.cls", b"3"), ("2.seg.png", png()), ("README", b"x")]
    index = index_shard(write_tar(tmp_path / "a.tar", [*members, ("3.txt", b"no image"), (".x.jpg", png())]))
    lines = index.not_taken.lines()
    assert not index.failures and any("hidden member" in line for line in lines)
    assert any(".seg.png member" in line and "another image" in line for line in lines)
    assert any("sample of only .txt" in line or "samples of only .txt" in line for line in lines)
    assert any("member without a suffix" in line and "README" in line for line in lines)


def test_case_05_links_in_a_tar_are_the_images_that_they_lead_to(tmp_path):
    hard, soft = (tarfile.LNKTYPE, "a/1.png"), (tarfile.SYMTYPE, "../a/1.png")
    members = [
        ("a/1.png", png("red")),
        ("b/2.png", hard),
        ("b/3.png", soft),
        ("b/4.png", (tarfile.SYMTYPE, "none.png")),
    ]
    index = index_shard(write_tar(tmp_path / "a.tar", members))
    assert [sample.key for sample in index.samples] == ["a/1", "b/2", "b/3"]
    assert "b/4.png" in index.not_taken.lines()[0]
    assert {content for _, content, _ in iterate_shard(tmp_path / "a.tar")} == {png("red")}


def test_case_05_in_training_and_bench(v2flow, tmp_path):
    tar = write_tar(tmp_path / "a.tar", [(f"22.0{i}.png", png()) for i in (5, 6, 7)])
    stream = SampleStream([str(tar)], seed=0)
    assert len(stream) == 1 and len(stream.failures) == 2
    done = v2flow("bench", tar, "--no-speed", "--no-codecs", "--no-fid")
    assert done.exit_code == 1 and "22.06.png" in done.stderr and "22.07.png" in done.stderr


def test_case_06_cleaned_names_stay_apart(v2flow, picture, tmp_path):
    for i, name in enumerate(["cat.1.jpg", "cat_1.jpg", "Cat_1.jpg", "con.png", "end .png", "end.png"]):
        picture(tmp_path / "p" / name, i)
    assert v2flow("encode", tmp_path / "p", "-o", tmp_path / "t").exit_code == 0
    done = v2flow("decode", tmp_path / "t", "-o", tmp_path / "d", "--json")
    images = json.loads(done.stdout)["images"]
    assert done.exit_code == 0 and len(images) == 6 == len(list((tmp_path / "d").glob("*.png")))
    assert len({os.path.basename(i).lower() for i in images}) == 6
    assert not {"con.png", "end .png"} & set(os.listdir(tmp_path / "d"))


def test_case_06_tars_whose_names_are_cleaned_to_one(v2flow, tmp_path):
    for i, name in enumerate(["s.1.tar", "s_1.tar", "x/y.tar"]):
        write_tar(tmp_path / "in" / name, [("a.png", png(("red", "green", "blue")[i]))])
    write_tar(tmp_path / "in" / "x.tar", [("y/a.png", png("white"))])
    done = v2flow("shard", tmp_path / "in", "-o", tmp_path / "o")
    assert done.exit_code == 0, done.stderr
    keys = [key for key, _, _ in iterate_shard(tmp_path / "o" / "shard-000000.tar")]
    assert len(set(keys)) == len(keys) == 4


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('file,caption\na.png,"a 12 inch record\nb.png,a cat\nc.png,a dog\n', "line 2 to 4 cannot be read"),
        ('file,caption\na.png,"a 12 inch record\nb.png,a 7" single\n', "line 2 to 3 cannot be read"),
        ('file,caption\na.png,"a record\nb.png,a cat"\n', "opens in line 2 is not closed before line 3"),
        ("file,caption\na.png,a cat, asleep\n", "row 2 has 3 fields, the header 2"),
        ("file,caption\na.png\n", "row 2 has 1 fields, the header 2"),
        ("file,caption\na.png," + "x" * 1_100_000 + "\n", "line 2 cannot be read .field larger"),
        ("file;text;caption\na.png;x\n", "row 2 has 2 fields, the header 3"),
        ("file,caption,caption\na.png,x,y\n", "names a column twice"),
        ("", "the first line is ''"),
        ("file,caption\ra.png,x\r", "lines end in CR"),
    ],
)
def test_case_07_tables_are_read_strictly(tmp_path, table, message):
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(DataError, match=message):
        list(read_caption_table(tmp_path / "t.csv"))


def test_case_07_long_captions_and_quoted_lines_are_no_fault(tmp_path):
    rows = ["file,caption", "a.png," + "y" * 140_000, 'b.png,"two ""quoted""\r\nlines, and a comma"', "", "c.png,"]
    (tmp_path / "t.csv").write_bytes("\r\n".join(rows).encode())
    found = {name: texts for _, name, texts in read_caption_table(tmp_path / "t.csv")}
    assert found == {"a.png": ["y" * 140_000], "b.png": ['two "quoted" lines, and a comma'], "c.png": []}


def test_case_08_class_folders_that_are_links(picture, tmp_path):
    picture(tmp_path / "else" / "fox" / "1.png")
    picture(tmp_path / "imgs" / "cat" / "2.png")
    os.symlink(tmp_path / "else" / "fox", tmp_path / "imgs" / "red_fox")
    captions = {s.image.key: s.captions for s in sources_from_classes(tmp_path / "imgs")}
    assert captions == {"cat/2": ("a photo of cat",), "red_fox/1": ("a photo of red fox",)}


def test_case_08_loops_of_links_end_and_are_named(picture, tmp_path):
    picture(tmp_path / "a" / "1.png")
    picture(tmp_path / "b" / "c" / "2.png")
    os.symlink(tmp_path, tmp_path / "a" / "up")
    os.symlink(tmp_path / "b", tmp_path / "a" / "side")
    os.symlink(tmp_path / "a", tmp_path / "b" / "side")
    os.symlink("self", tmp_path / "self")
    os.symlink("nowhere.png", tmp_path / "nowhere.png")
    left = NotTaken()
    assert [f.key for f in find_images([tmp_path], not_taken=left)] == ["a/1", "b/c/2", "nowhere"]
    assert sum(count for (kind, _), (count, _) in left.groups.items() if kind == "folders") == 3


def test_case_09_captions_beside_loose_images_are_kept(v2flow, picture, tmp_path):
    for i in range(3):
        picture(tmp_path / "p" / f"{i}.png", i)
    (tmp_path / "p" / "0.txt").write_text("a fox\na red fox\n")
    (tmp_path / "p" / "1.TXT").write_text("a cat")
    done = v2flow("encode", tmp_path / "p", "-o", tmp_path / "t", "--json")
    assert json.loads(done.stdout)["without_caption"] == 1 and "1 of 3 images have no caption" in done.stderr
    assert {s.key: s.captions for s in read_token_set(tmp_path / "t")} == {
        "0": ("a fox", "a red fox"),
        "1": ("a cat",),
        "2": (),
    }
    (tmp_path / "p" / "0.txt").unlink()  # captions that are gone do not stay beside the tokens
    assert v2flow("encode", tmp_path / "p", "-o", tmp_path / "t", "--force").exit_code == 0
    assert load_samples(tmp_path / "t" / "0.npy") is None


def test_case_09_finetune_llm_says_how_many_images_have_no_caption(v2flow, picture, tmp_path):
    for i in range(3):
        picture(tmp_path / "p" / f"{i}.png", i)
    (tmp_path / "p" / "0.txt").write_text("a fox")
    (tmp_path / "p" / "9.heic").touch()
    assert v2flow("encode", tmp_path / "p", "-o", tmp_path / "t").exit_code == 0
    assert v2flow("shard", tmp_path / "p", "-o", tmp_path / "s").exit_code == 0
    for photos, tokens in ((("p",), ()), (("s",), ()), ((), ("t",))):
        data = SimpleNamespace(
            photos=[str(tmp_path / name) for name in photos], token_sets=[str(tmp_path / name) for name in tokens]
        )
        lines: list[str] = []
        log_data(data, str(tmp_path / "run"), lines.append)
        assert lines[-1].startswith("2 of 3 images have no caption")
        assert ("not taken: 1 .heic file (9.heic)" in lines[0]) == (photos == ("p",))


@pytest.mark.parametrize("command", ["encode", "shard", "bench"])
def test_case_10_other_files_are_counted_by_suffix(v2flow, picture, tmp_path, command):
    picture(tmp_path / "p" / "a.JPEG")
    for name in ("b.HEIC", "c.heic", "d.nef", "notes.md", "lonely.txt", ".hidden.jpg", "e.zip"):
        (tmp_path / "p" / name).write_bytes(b"x")
    more = {"bench": ["--no-speed", "--no-codecs", "--no-fid"]}.get(command, ["-o", tmp_path / "o"])
    done = v2flow(command, tmp_path / "p", *more, "--json")
    assert done.exit_code == 0, done.stderr
    groups = {group["kind"]: group for group in json.loads(done.stdout)["not_taken"]}
    assert groups[".heic files"]["count"] == 2 and "convert them" in groups[".heic files"]["reason"]
    assert {".nef files", ".md files", ".txt files", ".zip files", "hidden files"} <= groups.keys()
    assert "not taken: 2 .heic files (b.HEIC, c.heic): the format is not supported" in done.stderr


def test_case_10_an_input_of_other_files_alone_says_what_lies_there(tmp_path):
    (tmp_path / "a.heic").touch()
    with pytest.raises(DataError, match=r"no images in it.*It holds \.heic"):
        find_images([tmp_path])


@pytest.mark.parametrize("command", ["encode", "shard", "bench"])
def test_case_08_a_folder_that_cannot_be_read_is_listed(v2flow, picture, tmp_path, monkeypatch, command):
    picture(tmp_path / "p" / "a" / "1.png")
    picture(tmp_path / "p" / "closed" / "2.png")
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    more = {"bench": ["--no-speed", "--no-codecs", "--no-fid"]}.get(command, ["-o", tmp_path / "o"])
    done = v2flow(command, tmp_path / "p", *more)
    assert done.exit_code == 1 and "closed: the folder cannot be read (Permission denied)" in done.stderr
    assert command == "bench" or (tmp_path / "o").exists()  # the rest is done


def test_special_files_are_not_opened(picture, tmp_path):
    picture(tmp_path / "1.png")
    os.mkfifo(tmp_path / "2.png")
    os.symlink("2.png", tmp_path / "3.png")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        find_images([tmp_path / "2.png"])
    left = NotTaken()
    assert [f.key for f in find_images([tmp_path], not_taken=left)] == ["1"]
    assert left.lines()[0].startswith("2 special files")


def test_a_table_says_which_rows_and_images_do_not_meet(picture, tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / "p" / name)
    (tmp_path / "t.csv").write_text("file,caption\na.png,x\nA.png,y\na.png,x\n")
    failures, left = [], NotTaken()
    (source,) = sources_from_table(tmp_path / "p", tmp_path / "t.csv", failures, not_taken=left)
    assert source.captions == ("x",)
    assert "row 3" in failures[0].reason and "b.png" in left.lines()[0]


def test_case_25_gzipped_tars_and_brace_lists(v2flow, tmp_path):
    members = [(f"{i}.png", png()) for i in range(3)]
    write_tar(tmp_path / "s-000.tar", members)
    write_tar(tmp_path / "s-001.tar.gz", [*members, ("1.txt", b"a cat")], "w:gz")
    write_tar(tmp_path / "s-002.TGZ", members, "w:gz")
    found = find_inputs([tmp_path])
    assert [tar.key for tar in found.tars] == ["s-000", "s-001", "s-002"]
    assert [captions for _, _, captions in iterate_shard(tmp_path / "s-001.tar.gz")] == [(), ("a cat",), ()]
    assert len(SampleStream([str(tmp_path)], seed=0)) == 9
    done = v2flow("encode", tmp_path / "s-{000..002}.*", "-o", tmp_path / "t")
    assert done.exit_code == 0 and "9 images in 3 files" in done.stdout
    assert v2flow("shard", tmp_path / "s-001.tar.gz", "-o", tmp_path / "o").exit_code == 0
    done = v2flow("encode", tmp_path / "none-{000..003}.tar", "-o", tmp_path / "x")
    assert done.exit_code == 1 and "no such file or folder" in done.stderr and "none-000.tar" in done.stderr
    done = v2flow("encode", tmp_path / "none.tar", "-o", tmp_path / "x")
    assert "globs" in done.stderr and "brace lists" in done.stderr


@pytest.mark.parametrize("cut", [0.5, 0.9])
def test_case_25_a_gzipped_tar_that_is_cut_short(tmp_path, cut):
    path = write_tar(tmp_path / "a.tar.gz", [(f"{i}.png", os.urandom(5000)) for i in range(9)], "w:gz")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * cut)])
    index = index_shard(path)
    assert 0 < len(index.samples) < 9 and index.failures[-1].samples is None


def test_case_25_a_gzipped_tar_whose_checksum_is_wrong(tmp_path):
    content = bytearray(gzip.compress(write_tar(tmp_path / "a.tar", [("1.png", png())]).read_bytes()))
    content[-6] ^= 1
    (tmp_path / "b.tar.gz").write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        index_shard(tmp_path / "b.tar.gz")


def test_case_26_the_same_names_from_several_folders(v2flow, picture, tmp_path):
    for place in ("a/1.jpg", "b/1.jpg", "b/2.jpg"):
        picture(tmp_path / place)
    done = v2flow(
        "encode", tmp_path / "a" / "1.jpg", tmp_path / "b" / "1.jpg", tmp_path / "b" / "2.jpg", "-o", tmp_path / "t"
    )
    assert done.exit_code == 0, done.stderr
    assert sorted(json.loads((tmp_path / "t" / "manifest.json").read_text())["files"]) == ["a/1", "b/1", "b/2"]
    keys = [f.key for f in find_images([tmp_path / "a", tmp_path / "b", tmp_path / "a" / ".." / "a" / "1.jpg"])]
    assert keys == ["a/1", "b/1", "b/2"]
