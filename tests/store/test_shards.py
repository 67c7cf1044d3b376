"""Tars: an index of offsets, damage, safe keys, and reproducible writing."""

import hashlib
import io
import json
import tarfile

import pytest
import webdataset
from PIL import Image

from v2flow_cli.errors import DataError
from v2flow_cli.jobs.shard import ShardReport, write_shards
from v2flow_cli.jobs.shard_sources import Source, sources_from_classes, sources_from_sidecars, sources_from_table
from v2flow_cli.store.find import InputFile, find_tars
from v2flow_cli.store.names import safe_key
from v2flow_cli.store.shard_index import read_member
from v2flow_cli.store.shards import index_shard, iterate_shard


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def save_image(path, colour=(1, 2, 3), size=(16, 12), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def test_index_gives_offsets_of_every_member(tmp_path):
    members = [("a/1.jpg", b"one"), ("a/1.txt", b"x\n y \n\n"), ("2.seg.png", b"s"), ("2.png", b"two" * 300)]
    path = write_tar(tmp_path / "t.tar", [*members, (".hidden.jpg", b"h"), ("no_suffix", b"n")])
    one, two = index_shard(path).samples
    assert (one.key, one.image, two.key, two.image) == ("a/1", "jpg", "2", "png")
    with open(path, "rb") as file:
        assert read_member(file, two.members["png"]) == b"two" * 300
        assert read_member(file, two.members["seg.png"]) == b"s"
    assert list(iterate_shard(path)) == [("a/1", b"one", ("x", "y")), ("2", b"two" * 300, ())]


def test_members_of_a_key_need_not_be_adjacent(tmp_path):
    path = write_tar(tmp_path / "t.tar", [("1.jpg", b"a"), ("2.jpg", b"b"), ("1.txt", b"c")])
    assert [sorted(s.members) for s in index_shard(path).samples] == [["jpg", "txt"], ["jpg"]]


def test_a_sample_with_a_repeated_member_is_left_out(tmp_path):
    index = index_shard(write_tar(tmp_path / "t.tar", [("1.jpg", b"a"), ("1.jpg", b"b"), ("2.jpg", b"c")]))
    (failure,) = index.failures
    assert [s.key for s in index.samples] == ["2"] and failure.key == "1" and "holds 1.jpg twice" in failure.reason


def test_every_truncation_is_noticed_and_only_whole_samples_remain(tmp_path):
    content = write_tar(tmp_path / "t.tar", [(f"{i}.jpg", b"x" * 700) for i in range(4)]).read_bytes()
    end = 4 * (512 + 1024)
    (tmp_path / "cut.tar").write_bytes(content[:100])
    with pytest.raises(DataError, match=r"cut\.tar: not a complete tar"):
        index_shard(tmp_path / "cut.tar")
    for size in range(512, end + 512, 128):
        (tmp_path / "cut.tar").write_bytes(content[:size])
        index = index_shard(tmp_path / "cut.tar")
        # Nobody can tell whether the last one before the cut had a caption to come.
        assert [s.key for s in index.samples] == [str(i) for i in range(max(0, size // 1536 - 1))]
        assert index.failures[-1].samples is None and "damaged or truncated at byte" in index.failures[-1].reason
    (tmp_path / "cut.tar").write_bytes(content[: end + 512])  # only padding is missing
    index = index_shard(tmp_path / "cut.tar")
    assert len(index.samples) == 4 and not index.failures


@pytest.mark.parametrize(
    "damage", [lambda block: bytes([block[0], block[1] ^ 1]) + block[2:], lambda block: bytes(512)]
)
def test_a_damaged_or_zeroed_header_is_not_the_end_of_the_tar(tmp_path, damage):
    content = write_tar(tmp_path / "t.tar", [(f"{i}.jpg", b"x" * 700) for i in range(4)]).read_bytes()
    at = 2 * (512 + 1024)
    (tmp_path / "t.tar").write_bytes(content[:at] + damage(content[at : at + 512]) + content[at + 512 :])
    index = index_shard(tmp_path / "t.tar")
    assert [s.key for s in index.samples] == ["0"]
    assert [f.key for f in index.failures] == ["1", None]
    assert "damaged or truncated at byte 3,072" in index.failures[1].reason


def test_files_that_are_not_tars(tmp_path):
    with pytest.raises(DataError, match="no such shard"):
        index_shard(tmp_path / "none.tar")
    (tmp_path / "text.tar").write_text("text" * 500)
    with pytest.raises(DataError, match="not a complete tar"):
        index_shard(tmp_path / "text.tar")
    with tarfile.open(tmp_path / "z.tar", "w:xz") as tar:
        tar.addfile(tarfile.TarInfo("1.jpg"))
    with pytest.raises(DataError, match="not a complete tar"):
        index_shard(tmp_path / "z.tar")


def test_find_tars(tmp_path):
    for name in ("b.tar", "a.tar", "sub/c.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [tar.key for tar in find_tars([tmp_path])] == ["a", "b", "sub/c"]
    assert [tar.path.name for tar in find_tars([f"{tmp_path}/b*.tar", tmp_path / "b.tar"])] == ["b.tar"]
    save_image(tmp_path / "images" / "1.png")
    with pytest.raises(DataError, match=r"no \.tar in it"):
        find_tars([tmp_path / "images"])


@pytest.mark.parametrize(
    ("key", "safe"),
    [
        ("cats/1", "cats/1"),
        ("/etc/passwd", "etc/passwd"),
        ("../../up", "up"),
        ("a.b.c", "a_b_c"),
        ("..\\win\\x", "win/x"),
        ("C:\\x", "C_/x"),
        ("", "image"),
        ("../..", "image"),
        ("new\nline\0", "new_line_"),
    ],
)
def test_safe_keys(key, safe):
    assert safe_key(key) == safe


def test_safe_keys_stay_apart_and_short():
    taken = set()
    assert [safe_key(k, taken) for k in ("Cat", "cat", "CAT", "cat-2", "a.b", "a_b")] == [
        "Cat", "cat-2", "CAT-3", "cat-2-2", "a_b", "a_b-2"
    ]  # fmt: skip
    long = safe_key("ü" * 300)
    assert len(long.encode()) <= 200
    assert long != safe_key("ü" * 301)


def test_write_shards_keeps_bytes_and_other_tools_read_them(tmp_path):
    src, out = tmp_path / "src", tmp_path / "out"
    save_image(src / "cats" / "1.jpg", quality=90)
    (src / "cats" / "1.txt").write_text("a cat\n\nthe cat\n")
    save_image(src / "2.v1.png")
    save_image(src / "3.bmp", (9, 8, 7))
    save_image(src / "4.jpg").rename(src / "really_png.jpg")
    Image.new("RGB", (3, 3)).save(src / "really_png.jpg", "PNG")
    report = write_shards(sources_from_sidecars(src), out, prefix="set", shard_bytes=10**6)
    assert (report.samples, report.captions, report.failures) == (4, 2, [])
    samples = list(webdataset.WebDataset(str(out / "set-000000.tar"), shardshuffle=False))
    assert [s["__key__"] for s in samples] == ["2_v1", "3", "cats/1", "really_png"]
    assert samples[2]["jpg"] == (src / "cats" / "1.jpg").read_bytes()
    assert samples[2]["txt"] == b"a cat\nthe cat"
    assert samples[3]["png"] == (src / "really_png.jpg").read_bytes()
    assert Image.open(io.BytesIO(samples[1]["png"])).getpixel((0, 0)) == (9, 8, 7)
    manifest = json.loads((out / "manifest.json").read_text())
    content = (out / "set-000000.tar").read_bytes()
    assert (manifest["samples"], manifest["bytes"]) == (4, len(content))
    (shard,) = manifest["shards"]
    assert shard.pop("sha256") == hashlib.sha256(content).hexdigest()
    index = (out / "set-000000.index.jsonl").read_bytes()
    assert shard.pop("index_sha256") == hashlib.sha256(index).hexdigest()
    assert shard == {"name": "set-000000.tar", "samples": 4, "bytes": len(content)}


def test_shards_are_bounded_and_the_same_twice(tmp_path):
    for i in range(10):
        save_image(tmp_path / "src" / f"{i}.png", (i, i, i))
    size = 4 * 1024 + 100  # two blocks a sample: four samples fit
    for out in ("one", "two"):
        write_shards(sources_from_sidecars(tmp_path / "src"), tmp_path / out, prefix="s", shard_bytes=size, workers=3)
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert names == ["manifest.json", *sorted(f"s-00000{i}.{e}" for i in range(3) for e in ("tar", "index.jsonl"))]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    counts = [s["samples"] for s in json.loads((tmp_path / "one" / "manifest.json").read_text())["shards"]]
    assert counts == [4, 4, 2]


def test_shards_are_not_overwritten_unless_forced(tmp_path):
    for i in range(4):
        save_image(tmp_path / "src" / f"{i}.png")
    out = tmp_path / "out"
    write_shards(sources_from_sidecars(tmp_path / "src"), out, prefix="s", shard_bytes=1)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(DataError, match=r"s-000000\.tar: exists already. Use --force"):
        write_shards(sources_from_sidecars(tmp_path / "src"), out, prefix="s", shard_bytes=10**6)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"x")
    report = write_shards([Source(InputFile(bad, "bad"), ())], out, prefix="s", shard_bytes=1, force=True)
    assert report.samples == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before  # nothing good to put in its place
    write_shards(sources_from_sidecars(tmp_path / "src"), out, prefix="s", shard_bytes=10**6, force=True)
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "s-000000.index.jsonl", "s-000000.tar"]


def test_bad_images_are_listed_and_the_rest_is_kept(tmp_path):
    save_image(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_text("text")
    report = write_shards(sources_from_sidecars(tmp_path), tmp_path / "out", prefix="s", shard_bytes=10**6)
    assert report.samples == 1
    (failure,) = report.failures
    assert failure.source.endswith("bad.jpg") and failure.reason.startswith("not an image")


def test_images_are_reduced_once_and_never_enlarged(tmp_path):
    save_image(tmp_path / "large.png", size=(300, 200))
    save_image(tmp_path / "small.png", size=(30, 20))
    write_shards(sources_from_sidecars(tmp_path), tmp_path / "out", prefix="s", shard_bytes=10**6, short_side=100)
    sizes = [Image.open(io.BytesIO(c)).size for _, c, _ in iterate_shard(tmp_path / "out" / "s-000000.tar")]
    assert sizes == [(150, 100), (30, 20)]


def test_an_output_that_cannot_be_written(tmp_path):
    save_image(tmp_path / "src" / "1.png")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DataError, match=r"cannot be (written|replaced)"):
        write_shards(sources_from_sidecars(tmp_path / "src"), tmp_path / "out", prefix="s", shard_bytes=1)


def test_class_folders(tmp_path):
    save_image(tmp_path / "red_fox" / "1.png")
    save_image(tmp_path / "0.png")
    assert [s.captions for s in sources_from_classes(tmp_path)] == [(), ("a photo of red fox",)]


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("t.csv", 'file,caption\nb.png,"two, words"\na/1.png,first\na/1.png,second\nnone.png,lost\n'),
        (
            "t.jsonl",
            '{"image": "b.png", "text": "two, words"}\n\n'
            '{"path": "a/1.png", "captions": ["first", "second"]}\n'
            '{"file": "none.png", "caption": "lost"}\n',
        ),
    ],
)
def test_caption_tables(tmp_path, name, table):
    save_image(tmp_path / "a" / "1.png")
    save_image(tmp_path / "b.png")
    save_image(tmp_path / "unlisted.png")
    (tmp_path / name).write_text(table)
    report = ShardReport()
    sources = list(sources_from_table(tmp_path, tmp_path / name, report.failures))
    assert [(s.image.key, s.captions) for s in sources] == [
        ("b", ("two, words",)),
        ("a/1", ("first", "second")),
    ]
    (failure,) = report.failures
    assert failure.source.endswith("none.png") and "not an image in" in failure.reason


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("t.csv", "picture,words\na.png,x\n", r"the first line is 'picture,words'; expected a header"),
        ("t.jsonl", '{"file": "a.png"}\n', "row 1 needs an image"),
        ("t.jsonl", '{"file": "a.png", "caption": [1]}\n', "row 1 needs an image"),
        ("t.jsonl", "[1]\n", "row 1 needs an image"),
        ("t.jsonl", "{oops\n", "row 1 is not JSON"),
        ("t.csv", b"\xff\xfe\x00", "cannot be read as UTF-16 text"),
    ],
)
def test_bad_tables(tmp_path, name, table, message):
    save_image(tmp_path / "a.png")
    (tmp_path / name).write_bytes(table if isinstance(table, bytes) else table.encode())
    with pytest.raises(DataError, match=message):
        list(sources_from_table(tmp_path, tmp_path / name, []))


def test_failures_of_earlier_versions_are_read(tmp_path):
    from v2flow_cli.store.failures import Failure, load_failures, save_failures

    lost = [Failure("a.tar", "cut", "k", 2), Failure("b.jpg", "empty", None, None)]
    save_failures(tmp_path / "x.bad.jsonl", lost)
    text = (tmp_path / "x.bad.jsonl").read_text()
    (tmp_path / "old.bad.jsonl").write_text(text.replace('"source"', '"shard"'))  # as version a4f45f9 wrote it
    assert load_failures(tmp_path / "x.bad.jsonl") == load_failures(tmp_path / "old.bad.jsonl") == lost
