"""Every kind of image file a user may have: a picture, or one sentence."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from v2flow_cli.errors import DataError
from v2flow_cli.store.find import find_images
from v2flow_cli.store.images import MAX_PIXELS, open_image


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(size=(64, 48)) -> Image.Image:
    rows, columns = np.mgrid[0 : size[1], 0 : size[0]]
    channels = [rows * 255 // size[1], columns * 255 // size[0], (rows + columns) % 256]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def pixel(image: Image.Image, at=(0, 0)) -> tuple:
    assert image.mode == "RGB"
    return image.getpixel(at)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_back_equal(format):
    options = {"lossless": True} if format == "WEBP" else {}
    image = open_image(encoded(photo(), format, **options), "x")
    assert np.array_equal(np.asarray(image), np.asarray(photo()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.jpg: the file is empty"),
        (b"just some text, not an image\n" * 20, "x.jpg: not an image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
        (png_claiming(10_000, 10_000), r"10000 x 10000 is 100,000,000 pixels; the limit is 50,000,000"),
        (png_claiming(60_000, 60_000), "the limit"),
        (png_claiming(100, 100), "a damaged or truncated PNG"),
    ],
    ids=["zero-bytes", "text", "eps", "bomb", "huge-bomb", "no-data"],
)
def test_files_that_are_not_images_are_data_errors(content, message):
    with pytest.raises(DataError, match=message):
        open_image(content, "x.jpg")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files_are_data_errors(format, share):
    content = encoded(photo((200, 160)), format)
    with pytest.raises(DataError, match=r"^cut: "):
        open_image(content[: int(len(content) * share)], "cut")


def test_the_limit_itself_is_allowed_and_checked_before_decoding():
    with pytest.raises(DataError, match="damaged"):  # the size passed, the missing data did not
        open_image(png_claiming(MAX_PIXELS // 5_000, 5_000), "x")


def test_a_missing_file_and_a_folder_are_data_errors(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        open_image(tmp_path / "none.jpg", "none.jpg")
    with pytest.raises(DataError, match="cannot be read"):
        open_image(tmp_path, "folder")


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (77, 255), (77, 77, 77)),
        ("RGBA", (200, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 257 * 100, (100, 100, 100)),
        ("I;16", 200, (1, 1, 1)),
    ],
)
def test_modes_of_png(mode, colour, expected):
    assert pixel(open_image(encoded(Image.new(mode, (3, 2), colour), "PNG"), "x")) == expected


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [("I", 257 * 100, 100), ("F", 0.5, 128), ("F", 200.0, 200), ("F", 65535.0, 255), ("F", float("nan"), 0)],
)
def test_deep_tiff(mode, colour, expected):
    image = open_image(encoded(Image.new(mode, (3, 2), colour), "TIFF"), "x")
    assert pixel(image) == (expected,) * 3


def test_palette_with_and_without_transparency():
    image = photo().quantize(16)
    assert np.array_equal(np.asarray(open_image(encoded(image, "PNG"), "x")), np.asarray(image.convert("RGB")))
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((1, 0), 1)
    seen = open_image(encoded(image, "PNG", transparency=0), "x")
    assert pixel(seen) == (255, 255, 255)
    assert pixel(seen, (1, 0)) == (200, 0, 0)


def test_cmyk_jpeg_with_adobe_inversion():
    """Pillow, like Photoshop, writes an Adobe marker and inverted values."""
    content = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert b"Adobe" in content
    red, green, blue = pixel(open_image(content, "x"))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    upright = photo((8, 6))
    turned = {  # what a camera that notes this orientation stores
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = open_image(encoded(turned, "PNG", exif=exif), "x")
    assert np.array_equal(np.asarray(image), np.asarray(upright))


def test_damaged_exif_does_not_lose_the_photo():
    content = encoded(photo(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert open_image(content, "x").size == (64, 48)


@pytest.mark.parametrize("size", [(1, 1), (10_000, 1), (1, 10_000)])
def test_odd_shapes(size):
    assert open_image(encoded(Image.new("RGB", size, (1, 2, 3)), "PNG"), "x").size == size


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    red, _, blue = pixel(open_image(content, "x"))
    assert red > 240 and blue < 15


def test_find_images_walks_folders_in_order(tmp_path):
    for name in ("b/2.PNG", "b/1.jpg", "a.webp", "notes.txt", ".hidden.jpg", ".git/x.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [f.key for f in find_images([tmp_path])] == ["a", "b/1", "b/2"]
    assert [f.key for f in find_images([tmp_path / "b" / "1.jpg"])] == ["1"]
    assert [f.key for f in find_images([f"{tmp_path}/*/*.jpg"])] == ["b/1"]
    assert [f.key for f in find_images([f"{tmp_path}/**/*.jpg"])] == ["b/1"]


def test_find_images_keeps_keys_apart(tmp_path):
    for name in ("a.jpg", "a.png", "b.png", "x/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [f.key for f in find_images([tmp_path])] == ["a.jpg", "a.png", "b", "x/b"]
    keys = [f.key for f in find_images([tmp_path / "b.png", tmp_path / "x"])]
    assert keys == [f"{tmp_path.name}/b", "x/b"]


def test_find_images_refuses_nothing(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        find_images([tmp_path / "none"])
    with pytest.raises(DataError, match="no images in it"):
        find_images([tmp_path])
    with pytest.raises(DataError, match="no file matches"):
        find_images([f"{tmp_path}/*.jpg"])
