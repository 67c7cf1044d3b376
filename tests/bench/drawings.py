"""Simple drawings with titles: shapes in colours, as cut-outs and on grounds."""

import io
import json
import tarfile

import numpy as np
from PIL import Image, ImageDraw

TONES = {"red": (205, 30, 30), "green": (50, 150, 60), "blue": (40, 90, 210), "yellow": (245, 215, 40)}
SHAPES = ("disc", "bar", "cross")


def shape(name, colour, side=96, lean=0):
    """A cut-out (RGBA) of a shape; ``lean`` varies the drawing."""
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    pen, tone = ImageDraw.Draw(image), (*TONES[colour], 255)
    a, b, third = 4 + lean, side - 5 - lean, side // 3
    if name == "disc":
        pen.ellipse((a, a, b, b), fill=tone)
    elif name == "bar":
        pen.rectangle((a, third + 8, b, side - third - 8), fill=tone)
    else:
        pen.rectangle((a, third, b, side - third), fill=tone)
        pen.rectangle((third, a, side - third, b), fill=tone)
    return image


def scene(*placed, ground="white", side=192):
    """(H, W, 3) uint8: cut-outs with their middles at (x, y), shares of the side."""
    image = Image.new("RGB", (side, side), ground)
    for cut, x, y in placed:
        image.paste(cut, (round(x * side - cut.width / 2), round(y * side - cut.height / 2)), cut)
    return np.asarray(image)


def write_tar(path, hands=3, first=0, captions=False):
    """Every shape in every colour in ``hands`` variants, from ``first`` on: KEY.png with KEY.json, or KEY.txt."""
    with tarfile.open(path, "w") as tar:
        for name in SHAPES:
            for colour in TONES:
                for hand in range(first, first + hands):
                    key = f"{name}-{colour}-{hand}"
                    content = io.BytesIO()
                    shape(name, colour, lean=3 * hand).save(content, "PNG")
                    record = {"title": name, "colour_title": f"{colour} {name}", "colours": [colour]}
                    text = f"a {colour} {name}\na drawing of a {name}"
                    beside = (f"{key}.txt", text.encode()) if captions else (f"{key}.json", json.dumps(record).encode())
                    for file, data in ((f"{key}.png", content.getvalue()), beside):
                        info = tarfile.TarInfo(file)
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    return path
