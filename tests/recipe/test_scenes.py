"""recipes/default/scenes.py: scenes of cut-out drawings, the same bytes each time, with captions that fit."""

import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

SCRIPT = Path(__file__).parents[2] / "recipes" / "default" / "scenes.py"


@pytest.fixture(scope="module")
def scenes():
    spec = importlib.util.spec_from_file_location("scenes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["scenes"] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scenes"]


@pytest.fixture
def drawings_tar(tmp_path):
    """Twelve circles on transparent ground, of four titles in three styles each."""
    path = tmp_path / "drawings.tar"
    titles = (("fox face", "animals"), ("red apple", "food"), ("house", "travel"), ("bus", "travel"))
    with tarfile.open(path, "w") as tar:
        for number in range(12):
            title, category = titles[number % 4]
            image = Image.new("RGBA", (64, 48))
            ImageDraw.Draw(image).ellipse((8, 8, 40, 40), fill=(200, 60, 20 * number, 255))
            content = io.BytesIO()
            image.save(content, "WEBP", lossless=True)
            fact = {"title": title, "category": category, "colours": ["red"], "colour_title": None, "kind": "emoji"}
            for suffix, data in (("webp", content.getvalue()), ("json", json.dumps(fact).encode())):
                member = tarfile.TarInfo(f"drawing-{number:02d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def run(scenes, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["scenes.py", *map(str, arguments)])
    scenes.main()


def members(folder):
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {m.name: tar.extractfile(m).read() for m in tar}
    return found


def test_a_scene_depends_on_seed_and_number_alone(scenes, monkeypatch, drawings_tar, tmp_path):
    for name, count in (("a", 4), ("b", 7)):
        run(scenes, monkeypatch, "--drawings", drawings_tar, "--out", tmp_path / name, "--count", count)
    short, long = members(tmp_path / "a"), members(tmp_path / "b")
    assert len(short) == 8 and len(long) == 14
    assert all(long[name] == content for name, content in short.items())
    run(scenes, monkeypatch, "--drawings", drawings_tar, "--out", tmp_path / "c", "--count", 4, "--seed", 1)
    assert members(tmp_path / "c") != short


def test_held_out_drawings_are_in_no_scene(scenes, monkeypatch, drawings_tar, tmp_path):
    monkeypatch.setattr(scenes, "HELD_OUT_TITLES", 1.0)
    run(scenes, monkeypatch, "--drawings", drawings_tar, "--out", tmp_path / "learn", "--layout", "centred")
    run(scenes, monkeypatch, "--drawings", drawings_tar, "--out", tmp_path / "judge", "--held-out")
    learn, judge = (set(members(tmp_path / name)) for name in ("learn", "judge"))
    assert len(learn) == 2 * 8 and len(judge) == 2 * 4 and not learn & judge


def test_few_drawings_of_a_title(scenes, monkeypatch, drawings_tar, tmp_path):
    monkeypatch.setattr(scenes, "HELD_OUT_TITLES", 0.0)
    arguments = ("--drawings", drawings_tar, "--out", tmp_path / "few", "--layout", "centred", "--per-title", 2)
    run(scenes, monkeypatch, *arguments)
    assert len(members(tmp_path / "few")) == 2 * 8


def test_common_things_are_those_of_several_sets(scenes, monkeypatch, drawings_tar):
    drawings = scenes.read_drawings(drawings_tar)
    monkeypatch.setattr(scenes, "COMMON_CATEGORIES", {"animals", "food"})
    monkeypatch.setattr(scenes, "COMMON_STYLES", 3)
    monkeypatch.setattr(scenes, "ALSO_COMMON", {"bus"})
    assert {d.title for d in scenes.common_things(drawings)} == {"fox face", "red apple", "bus"}
    monkeypatch.setattr(scenes, "COMMON_STYLES", 4)
    assert {d.title for d in scenes.common_things(drawings)} == {"bus"}


def test_a_centred_drawing_is_in_the_middle_on_white(scenes, drawings_tar):
    drawing = scenes.read_drawings(drawings_tar)[0]
    image, captions = scenes.centred(drawing, drawing.names())
    pixels = image.convert("RGB")
    assert pixels.size == (256, 256) and pixels.getpixel((4, 4)) == (255, 255, 255)
    assert pixels.getpixel((128, 128))[0] > 150 > pixels.getpixel((128, 128))[1]
    assert {"a fox face", "a fox", "a red fox", "draw a fox", "fox"} <= set(captions)


def test_colour_words_match_the_pixels(scenes, drawings_tar):
    drawing = scenes.read_drawings(drawings_tar)[1]
    blue = scenes._recolour(drawing.open(), "blue")
    red, green, blue = blue.getpixel((blue.width // 2, blue.height // 2))[:3]
    assert blue > green > red


def test_recoloured_drawings(scenes, monkeypatch, drawings_tar, tmp_path):
    out = tmp_path / "colours"
    run(scenes, monkeypatch, "--drawings", drawings_tar, "--out", out, "--layout", "colours", "--per-title", 1)
    pictures = members(out)
    assert len(pictures) == 2 * 4 * scenes.COLOURS_OF_A_DRAWING
    for name in (name for name in pictures if name.endswith(".txt")):
        captions = pictures[name].decode().splitlines()
        colour = name.removesuffix(".txt").rpartition("-")[2]
        assert colour in scenes.COLOURS and colour not in ("red", "white")
        assert all(f"{colour} " in caption for caption in captions)
    grey = Image.new("RGBA", (64, 64), (90, 90, 90, 255))
    content = io.BytesIO()
    grey.save(content, "WEBP", lossless=True)
    stone = scenes.Drawing("a", content.getvalue(), "stone", None, (), "objects", "emoji")
    assert scenes.in_colours(stone, stone.names()) == []


def test_one_title_has_each_name(scenes, monkeypatch):
    """The title itself comes first, then the order of the aliases, then a noun with its colour left out."""
    monkeypatch.setattr(scenes, "ALIASES", {"racing car": ["car", "boat"], "sailboat": ["boat"], "blue gem": ["gem"]})
    titles = ["red car", "car", "car", "sailboat", "racing car", "green gem", "blue gem"]
    things = [scenes.Drawing(str(i), b"", title, None, (), "vehicles", "emoji") for i, title in enumerate(titles)]
    names = scenes.own_names(things)
    assert list(names.values()) == [
        ["red car"], ["car"], ["car"], ["sailboat"], ["racing car", "boat"], ["green gem"], ["blue gem", "gem"]
    ]  # fmt: skip


def test_articles_and_plurals(scenes):
    assert [scenes.with_article(t) for t in ("apple", "bus", "jeans", "two cats")] == [
        "an apple",
        "a bus",
        "jeans",
        "two cats",
    ]
    assert [scenes.plural(t) for t in ("box", "cherry", "slice of pizza", "cat")] == [
        "boxes",
        "cherries",
        "slices of pizza",
        "cats",
    ]
