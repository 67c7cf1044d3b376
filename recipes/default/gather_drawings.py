"""Emoji with titles as cut-outs in one tar, from the npm packages that docs/data/drawings.md names.

    pip install resvg-py
    python recipes/default/gather_drawings.py --packages npm/ --out drawings.tar

``npm/`` holds the .tgz files that ``npm pack`` fetched. Each drawing is ``KEY.webp`` (RGBA, longest side 224 px) and
``KEY.json``: title, colours, source and licence. The same packages and library versions
give the same bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from v2flow_cli.bench.colours import name_pixels
from v2flow_cli.cli.console import log, result
from v2flow_cli.cli.entry import run_script

SIDE = 224  # pixels, the longest side of a cut-out
TITLES = "emojibase-data-16.0.3.tgz"
GROUPS = {
    0: "faces and hearts",
    1: "people",
    3: "animals and nature",
    4: "food and drink",
    5: "travel and places",
    6: "activities",
    7: "objects",
}
#: What `npm pack` calls each package, the package, and its licence.
ICONS = {
    "iconify-json-noto-1.2.9.tgz": ("@iconify-json/noto 1.2.9", "Apache-2.0"),
    "iconify-json-noto-v1-1.2.5.tgz": ("@iconify-json/noto-v1 1.2.5", "Apache-2.0"),
    "iconify-json-fxemoji-1.2.2.tgz": ("@iconify-json/fxemoji 1.2.2", "Apache-2.0"),
    "iconify-json-twemoji-1.2.5.tgz": ("@iconify-json/twemoji 1.2.5", "CC-BY-4.0"),
    "iconify-json-emojione-1.2.3.tgz": ("@iconify-json/emojione 1.2.3", "CC-BY-4.0"),
    "iconify-json-streamline-emojis-1.2.4.tgz": ("@iconify-json/streamline-emojis 1.2.4", "CC-BY-4.0"),
}
PICTURES = {"lobehub-fluent-emoji-3d-1.1.0.tgz": ("@lobehub/fluent-emoji-3d 1.1.0", "MIT")}
MAIN_SHARE, COLOUR_SHARE = 0.6, 0.15  # of the pixels: one colour rules; a colour is listed


def read_titles(path: Path) -> dict[str, tuple[str, str]]:
    """(title, category) by code points in small letters without variation selectors, as "1f34e"."""
    with tarfile.open(path) as tar:
        emoji = json.loads(_member(tar, "package/en/data.json"))
    wanted = [e for e in emoji if e.get("group") in GROUPS and "gender" not in e]
    return {_code(e["hexcode"]): (e["label"], GROUPS[e["group"]]) for e in wanted}


def icons(path: Path, titles: dict[str, tuple[str, str]]) -> Iterator[tuple[str, bytes]]:
    """(code points, SVG) of every icon of an iconify package that has a title: by its code points, else by its name."""
    by_name = {_slug(title): code for code, (title, _) in titles.items()}
    with tarfile.open(path) as tar:
        found = json.loads(_member(tar, "package/icons.json"))
        codes = {name: _code(code) for code, name in json.loads(_member(tar, "package/chars.json")).items()}
    for name, icon in sorted(found["icons"].items()):
        code = codes.get(name) if codes else by_name.get(_slug(name))
        if code in titles:
            left, top = icon.get("left", 0), icon.get("top", 0)
            width, height = (icon.get(side, found.get(side, 16)) for side in ("width", "height"))
            box = f"{left} {top} {width} {height}"
            yield code, f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'.encode()


def pictures(path: Path, titles: dict[str, tuple[str, str]]) -> Iterator[tuple[str, bytes]]:
    """(code points, file) of every picture of a package that is named by its code points."""
    with tarfile.open(path) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            code = _code(Path(member.name).stem)
            if member.name.startswith("package/assets/") and code in titles:
                yield code, _member(tar, member.name)


def cut_out(content: bytes, is_svg: bool) -> Image.Image | None:
    """RGBA, cropped to what is not transparent, its longest side ``SIDE``; None where nothing is to be seen."""
    if is_svg:
        import resvg_py

        content = bytes(resvg_py.svg_to_bytes(svg_string=content.decode(), width=2 * SIDE, height=2 * SIDE))
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    box = image.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    if box is None:
        return None
    image = image.crop(box)
    scale = SIDE / max(image.size)
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)


def facts(image: Image.Image, title: str, category: str, source: str, licence: str) -> dict[str, Any]:
    """What ``KEY.json`` says."""
    pixels = np.asarray(image)
    names, counts = np.unique(name_pixels(pixels[pixels[..., 3] > 128][:, :3]), return_counts=True)
    shares = sorted(zip((counts / counts.sum()).tolist(), names.tolist()), reverse=True)
    record: dict[str, Any] = {"title": title}
    if shares[0][0] >= MAIN_SHARE and title.split(" ")[0] not in names:
        record["colour_title"] = f"{shares[0][1]} {title}"
    record |= {"kind": "emoji", "category": category, "source": f"npm {source}", "licence": licence}
    return record | {"colours": [name for share, name in shares[:3] if share >= COLOUR_SHARE] or [shares[0][1]]}


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    assert file is not None, name
    return file.read()


def _code(text: str) -> str:
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder of the .tgz files")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    missing = [name for name in (TITLES, *ICONS, *PICTURES) if not (options.packages / name).is_file()]
    if missing:
        parser.error(f"{options.packages}: {', '.join(missing)} missing; docs/data/drawings.md says how to fetch them")
    titles, count = read_titles(options.packages / TITLES), 0
    partial = options.out.with_suffix(".partial")
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, (source, licence) in {**ICONS, **PICTURES}.items():
            found = icons if name in ICONS else pictures
            before = count
            for code, content in found(options.packages / name, titles):
                image = cut_out(content, is_svg=name in ICONS)
                if image is None:
                    continue
                file = io.BytesIO()
                image.save(file, "WEBP", quality=92, method=4)
                record = facts(image, *titles[code], source, licence)
                _add(tar, f"drawing-{count:05d}.webp", file.getvalue())
                _add(tar, f"drawing-{count:05d}.json", json.dumps(record, ensure_ascii=False).encode())
                count += 1
            log(f"{source}: {count - before} drawings")
    partial.rename(options.out)
    result(f"{options.out}: {count} drawings")


if __name__ == "__main__":
    run_script(main)
