"""8. The hostile image set: what is a picture is encoded, what is none is listed, and nothing crashes."""

import io
import json
import struct
import zlib

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from v2flow_cli.cli.app import app


def png_claiming(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def hostile_set():
    """(name -> bytes of pictures, name -> bytes of what is none)."""
    photo = Image.radial_gradient("L").resize((48, 40)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [photo, photo.rotate(90), photo.rotate(180)]
    good = {
        "cmyk.jpg": saved(photo.convert("CMYK"), "JPEG"),
        "16bit.png": saved(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50), "PNG"),
        "alpha.png": saved(photo.convert("RGBA").rotate(30), "PNG"),
        "palette.png": saved(photo.quantize(16), "PNG", transparency=3),
        "exif.jpg": saved(photo, "JPEG", exif=exif),
        "1x1.png": saved(photo.resize((1, 1)), "PNG"),
        "10000x1.png": saved(photo.resize((10_000, 1)), "PNG"),
        "animated.gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
    }
    bad = {
        "bomb.png": png_claiming(60_000, 60_000),
        "larger_bomb.png": png_claiming(2**31 - 1, 2**31 - 1),
        "truncated.jpg": saved(photo, "JPEG")[:-300],
        "zero.jpg": b"",
        "text.jpg": b"this is a text",
    }
    return good, bad


def test_the_hostile_set(tmp_path, tiny_tokenizer_folder):
    good, bad = hostile_set()
    (tmp_path / "imgs").mkdir()
    for name, content in {**good, **bad}.items():
        (tmp_path / "imgs" / name).write_bytes(content)
    arguments = [
        str(tmp_path / "imgs"),
        "-o",
        str(tmp_path / "tokens"),
        "--model",
        str(tiny_tokenizer_folder),
        "--json",
    ]
    done = CliRunner().invoke(app, ["encode", *arguments])
    assert done.exit_code == 1 and "Traceback" not in done.output
    report = json.loads(done.stdout)
    assert report["images"] == len(good)
    assert {f["source"].rsplit("/", 1)[1] for f in report["failed"]} == bad.keys()
    assert all(f["reason"] for f in report["failed"])
    packed = CliRunner().invoke(app, ["shard", str(tmp_path / "imgs"), "-o", str(tmp_path / "tars"), "--json"])
    assert packed.exit_code == 1 and json.loads(packed.stdout)["samples"] == len(good)
