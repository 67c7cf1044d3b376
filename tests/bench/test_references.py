"""Titled pictures from tars and folders, and which are held out."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.bench.drawings import SHAPES, TONES, shape, write_tar
from v2flow_cli.bench.references import nouns_with_colours, read_references, split_held_out
from v2flow_cli.errors import DataError
from v2flow_cli.store.not_taken import NotTaken


def test_titles_of_json_and_of_captions_give_the_same_names(tmp_path):
    by_json = read_references([str(write_tar(tmp_path / "a.tar"))])
    by_text = read_references([str(write_tar(tmp_path / "b.tar", captions=True))])
    assert len(by_json) == len(by_text) == 36
    for one, other in zip(by_json, by_text):
        assert (one.key, one.noun, one.colour) == (other.key, other.noun, other.colour)
        assert set(one.names) == set(other.names) == {one.noun, f"{one.colour} {one.noun}"}


def test_folders_are_read_and_untitled_pictures_are_skipped(tmp_path):
    for number, beside in enumerate(({"title": "Red Fox face", "colours": ["red", "white"]}, {"licence": "MIT"}, None)):
        shape("disc", "red").convert("RGB").save(tmp_path / f"{number}.png")
        if beside is not None:
            (tmp_path / f"{number}.json").write_text(json.dumps(beside))
    (tmp_path / "2.json").write_text("no JSON {")
    [fox] = read_references([str(tmp_path)])
    assert fox.names == ("red fox face", "fox face", "red fox") and fox.colour == "red" and fox.noun == "fox face"


def test_sources_without_any_title_are_an_error(tmp_path):
    shape("disc", "red").save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"no picture with a title; expected KEY.json"):
        read_references([str(tmp_path)])


def test_cut_outs_get_a_white_margin_and_whole_pictures_none(tmp_path):
    shape("bar", "blue").save(tmp_path / "cut.png")
    Image.new("RGB", (50, 40), "blue").save(tmp_path / "whole.png")
    for key in ("cut", "whole"):
        (tmp_path / f"{key}.txt").write_text("a bar")
    cut, whole = read_references([str(tmp_path)])
    assert cut.pixels().shape == (116, 116, 3) and (cut.pixels()[:10] == 255).all()
    assert np.array_equal(whole.pixels(), np.full((40, 50, 3), (0, 0, 255)))


def test_one_picture_of_some_titles_is_held_out_and_the_same_ones_each_time(tmp_path):
    references = read_references([str(write_tar(tmp_path / "a.tar"))])
    kept, held = split_held_out(references)
    assert (kept, held) == split_held_out(references)
    assert len(kept) + len(held) == len(references) and len({r.noun for r in held}) == len(held) == 1
    few, none = split_held_out(references[:2])
    assert len(few) == 2 and not none


def test_nouns_and_their_colours(tmp_path):
    references = read_references([str(write_tar(tmp_path / "a.tar", hands=1))])
    assert nouns_with_colours(references) == {name: set(TONES) for name in sorted(SHAPES)}
    assert nouns_with_colours(references[:1]) == {} and len(nouns_with_colours(references[:1], least=1)) == 1


def test_unused_files_are_counted(tmp_path):
    """Pictures without a title, of a name that was there, and other files; a JSON file of Notepad is read."""
    for folder, names in (("first", ("fox", "plain")), ("second", ("fox",))):
        for name in names:
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / folder / f"{name}.png")
        (tmp_path / folder / "fox.json").write_text(json.dumps({"title": f"{folder} fox"}), encoding="utf-16")
    (tmp_path / "first" / "photo.heic").touch()
    not_taken = NotTaken()
    (fox,) = read_references([str(tmp_path / "first"), str(tmp_path / "second")], not_taken)
    assert fox.names[0] == "first fox"
    assert not_taken.lines() == [
        "1 .heic file (photo.heic): the format is not supported; convert them to JPEG or PNG",
        f"1 picture ({tmp_path}/first/plain): no title beside them",
        f"1 picture ({tmp_path}/second/fox): one of that name is there already",
    ]
