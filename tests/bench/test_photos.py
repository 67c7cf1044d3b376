"""Reading photos from folders and tars, with bad ones among them."""

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from v2flow_cli.bench.photos import PhotoReader
from v2flow_cli.errors import DataError


def save(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), colour).save(path)
    return path


def test_folder_with_a_bad_image(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "sub" / "c.jpg")
    (tmp_path / "b.jpg").write_text("no image")
    reader = PhotoReader([str(tmp_path)])
    assert reader.count == 3 and reader.failed == []
    assert [name for name, _ in reader] == ["a", "sub/c"]
    (failure,) = reader.failed
    assert failure.source == str(tmp_path / "b.jpg") and "not an image" in failure.reason


def test_tar_beside_a_file(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for key, content in (("a", save(tmp_path / "x" / "a.png").read_bytes()), ("bad", b"zero")):
            member = tarfile.TarInfo(f"{key}.png")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    reader = PhotoReader([str(tmp_path / "x" / "a.png"), str(tmp_path / "s.tar")])
    assert reader.count is None
    assert [name for name, _ in reader] == ["a", "a (2)"]
    assert [failure.source for failure in reader.failed] == [f"{tmp_path / 's.tar'}/bad"]


def test_damaged_tar_is_listed_and_the_rest_read(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(b"x" * 2000)
    save(tmp_path / "a.png")
    reader = PhotoReader([str(tmp_path / "s.tar"), str(tmp_path / "a.png")])
    assert [name for name, _ in reader] == ["a"]
    assert [failure.source for failure in reader.failed] == [str(tmp_path / "s.tar")]


def test_missing_and_empty_inputs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        PhotoReader([str(tmp_path / "none")])
    with pytest.raises(DataError, match="no images in it"):
        PhotoReader([str(tmp_path)])
