"""The scripts that build public data sets from packages: accepted and refused inputs."""

import gzip
import hashlib
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.bench.drawings import shape

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def photos(monkeypatch):
    """The script with three photos of our own in its list, and their contents."""
    module = load(RECIPES / "eval" / "public_photos.py")
    contents = {f"data/images/{name}.jpg": name.encode() * 9 for name in ("a", "b", "c")}
    monkeypatch.setattr(module, "PHOTOS", {name: hashlib.sha256(c).hexdigest() for name, c in contents.items()})

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["public_photos.py", *map(str, args)])
        module.main()

    return run, contents


def tar_of(files, mode):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


def write_deb(path, files):
    """An ar archive as dpkg makes it."""
    members = {"debian-binary": b"2.0\n", "control.tar.gz": gzip.compress(b"x"), "data.tar.xz": tar_of(files, "w:xz")}
    content = b"!<arch>\n"
    for name, data in members.items():
        content += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    path.write_bytes(content)


def test_photos_come_from_wheels_debian_packages_and_folders(photos, tmp_path, capsys):
    run, contents = photos
    first, second, third = contents
    packages = tmp_path / "packages"
    packages.mkdir()
    with zipfile.ZipFile(packages / "one.whl", "w") as wheel:
        wheel.writestr(f"package/{first}", contents[first])
        wheel.writestr("package/other.jpg", b"no photo of the set")
    write_deb(packages / "two.deb", {f"./usr/share/{second}": contents[second], "./usr/share/x": b"odd"})
    (packages / "site-packages" / third).parent.mkdir(parents=True)
    (packages / "site-packages" / third).write_bytes(contents[third])
    run(packages, "--out", tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        Path(n).name: c for n, c in contents.items()
    }
    assert "3 photos" in capsys.readouterr().out
    run(packages / "one.whl", packages / "two.deb", packages / "site-packages", "--out", tmp_path / "out")  # once more


def test_missing_and_wrong_photos_are_named_and_nothing_is_written(photos, tmp_path):
    run, contents = photos
    first, second, _ = contents
    with zipfile.ZipFile(tmp_path / "one.whl", "w") as wheel:
        wheel.writestr(f"p/{first}", contents[first])
        wheel.writestr(f"p/{second}", b"another version")
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "one.whl", "--out", tmp_path / "out")
    text = str(stopped.value)
    assert "one.whl/p/data/images/b.jpg: SHA-256" in text and "data/images/c.jpg: not in these packages" in text
    assert "2 of 3 photos are missing; nothing was written" in text and not (tmp_path / "out").exists()


def test_a_folder_with_other_files_and_odd_packages_are_refused(photos, tmp_path):
    run, contents = photos
    with zipfile.ZipFile(tmp_path / "all.whl", "w") as wheel:
        for name, content in contents.items():
            wheel.writestr(f"p/{name}", content)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.jpg").touch()
    with pytest.raises(SystemExit, match=r"holds other files \(mine.jpg\)"):
        run(tmp_path / "all.whl", "--out", tmp_path / "out")
    (tmp_path / "x.deb").write_bytes(b"no archive")
    for package, message in ((tmp_path / "x.deb", "not a Debian package"), (tmp_path / "none", "no such file")):
        with pytest.raises(SystemExit, match=message):
            run(package, "--out", tmp_path / "o")


def test_the_list_of_photos_is_complete():
    found = load(RECIPES / "eval" / "public_photos.py").PHOTOS
    assert len(found) == 20 and all(len(digest) == 64 for digest in found.values())
    assert len({Path(name).name for name in found}) == 20


def test_drawings_have_the_titles_of_their_code_points(tmp_path):
    script = load(RECIPES / "default" / "gather_drawings.py")
    emoji = [
        {"hexcode": "1F34E", "label": "red apple", "group": 4},
        {"hexcode": "2764-FE0F", "label": "red heart", "group": 0},
        {"hexcode": "1F1E9", "label": "flag", "group": 9},
        {"hexcode": "1F468", "label": "man", "group": 1, "gender": 1},
    ]
    titles_file, pictures_file = tmp_path / script.TITLES, tmp_path / next(iter(script.PICTURES))
    titles_file.write_bytes(tar_of({"package/en/data.json": json.dumps(emoji).encode()}, "w:gz"))
    titles = script.read_titles(titles_file)
    assert titles == {"1f34e": ("red apple", "food and drink"), "2764": ("red heart", "faces and hearts")}
    content = io.BytesIO()
    shape("disc", "red", side=300).save(content, "WEBP")
    files = {"package/assets/1f34e.webp": content.getvalue(), "package/assets/1f1e9.webp": content.getvalue()}
    pictures_file.write_bytes(tar_of(files, "w:gz"))
    [(code, file)] = script.pictures(pictures_file, titles)
    image = script.cut_out(file, is_svg=False)
    assert code == "1f34e" and image.mode == "RGBA" and max(image.size) == script.SIDE
    record = script.facts(image, *titles[code], "@x/y 1.0", "MIT")
    assert record["title"] == "red apple" and "colour_title" not in record and record["colours"] == ["red"]
    assert script.facts(image, "disc", "objects", "@x/y 1.0", "MIT")["colour_title"] == "red disc"
    assert script.cut_out(_png(Image.new("RGBA", (9, 9))), is_svg=False) is None


def test_icons_are_found_by_code_point_or_by_name(tmp_path):
    script = load(RECIPES / "default" / "gather_drawings.py")
    titles = {"1f34e": ("red apple", "food and drink"), "1f98a": ("fox", "animals and nature")}
    icons = {"icons": {"red-apple": {"body": "<a/>"}, "fox": {"body": "<b/>", "width": 8}}, "width": 32, "height": 32}
    for chars, codes in (({"1f34e": "red-apple"}, ["1f34e"]), ({}, ["1f98a", "1f34e"])):
        files = {"package/icons.json": json.dumps(icons).encode(), "package/chars.json": json.dumps(chars).encode()}
        (tmp_path / "x.tgz").write_bytes(tar_of(files, "w:gz"))
        found = dict(script.icons(tmp_path / "x.tgz", titles))
        assert list(found) == codes
    assert b'viewBox="0 0 8 32"><b/>' in found["1f98a"] and b'viewBox="0 0 32 32"><a/>' in found["1f34e"]


def test_missing_packages_are_errors(tmp_path):
    words = [
        sys.executable,
        RECIPES / "default" / "gather_drawings.py",
        "--packages",
        tmp_path,
        "--out",
        tmp_path / "d.tar",
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (
        done.returncode == 2 and "emojibase-data-16.0.3.tgz, " in done.stderr and "docs/data/drawings.md" in done.stderr
    )


def _png(image):
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
