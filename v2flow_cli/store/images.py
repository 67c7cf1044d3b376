"""Image files: finding them, and decoding anything a user may have into plain RGB or one clear DataError."""

from __future__ import annotations

import glob
import io
import itertools
import os
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from v2flow_cli.errors import DataError
from v2flow_cli.runtime.rgb import to_rgb

MAX_PIXELS = 50_000_000  # checked before decoding: a small file can claim any size

#: Formats that Pillow decodes itself; EPS, for one, would start another program.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .png .webp .avif .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm".split())

# Pillow warns of its own, larger limit and of damaged EXIF; here a file is a picture or a DataError.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


@dataclass(frozen=True)
class FoundFile:
    """A file and its key: its path inside the input it was found in, without suffix, '/' between."""

    path: Path
    key: str


def open_image(source: Path | bytes, name: str) -> Image.Image:
    """The picture as 8-bit RGB, upright (EXIF), alpha laid over white, the first frame of an animation.

    Args:   source, a file or the bytes of one; name, what messages call it.
    Raises: DataError for whatever is not a whole picture of at most MAX_PIXELS.
    """
    content = source if isinstance(source, bytes) else read_bytes(source)
    if not content:
        raise DataError(f"{name}: the file is empty (0 bytes); expected an image.")
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: over {MAX_PIXELS:,} pixels, the limit. Make it smaller first.") from error
    except Exception as error:  # Pillow's parsers raise a dozen types on damaged headers
        raise DataError(
            f"{name}: not an image of a known format ({', '.join(FORMATS)}), or its header is damaged."
        ) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: {width} x {height} is {width * height:,} pixels; the limit is {MAX_PIXELS:,}. "
            "Make it smaller first."
        )
    try:
        image.load()
        return to_rgb(image)
    except Exception as error:  # as above: OSError, SyntaxError, struct.error, zlib.error, ...
        raise DataError(f"{name}: a damaged or truncated {image.format} image ({error}).") from error


def png_bytes(image: Image.Image, info: PngInfo | None = None) -> bytes:
    """A PNG file of ``image``, with ``info`` as its text metadata."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_bytes(path: Path) -> bytes:
    """The whole file.  Raises: DataError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error


def find_images(inputs: Sequence[str | Path]) -> list[FoundFile]:
    """The images among files, folders (searched recursively) and globs, as ``find_files`` returns them."""
    return find_files(inputs, SUFFIXES, "images")


def find_files(inputs: Sequence[str | Path], suffixes: Collection[str], what: str) -> list[FoundFile]:
    """The visible files with one of ``suffixes`` among files, folders (recursively) and globs, sorted by key.

    Files whose keys would be equal but for the suffix (``a.jpg``, ``a.png``) keep the suffix in the key.
    Raises: DataError for an input that does not exist, has no such file, or repeats another one's keys.
    """
    found: dict[Path, str] = {}  # path -> path inside its input
    for given in inputs:
        root, paths = expand_input(str(given))
        paths = [p for p in paths if p.suffix.lower() in suffixes]
        if not paths:
            raise DataError(f"{given}: no {what} in it; they end in {', '.join(sorted(suffixes))}.")
        for path in paths:
            found.setdefault(path, path.relative_to(root).as_posix())
    stems = Counter(_without_suffix(name) for name in found.values())
    files: dict[str, FoundFile] = {}
    for path, name in found.items():
        stem = _without_suffix(name)
        key = stem if stems[stem] == 1 else name
        if key in files:
            raise DataError(f"{files[key].path} and {path}: both have the key {key}. Give one at a time.")
        files[key] = FoundFile(path, key)
    return [files[key] for key in sorted(files)]


def expand_input(given: str) -> tuple[Path, list[Path]]:
    """Root and visible files of one input: a folder, a file, or a glob (root: what precedes the wildcards).

    Raises: DataError if nothing is there, or a folder cannot be read.
    """
    path = Path(given)
    if path.is_dir():
        return path, [Path(folder, f) for folder, names in _walk(path) for f in names]
    if path.exists():
        return path.parent, [path]
    if glob.has_magic(given):
        fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        paths = [Path(p) for p in sorted(glob.glob(given, recursive=True))]
        if not paths:
            raise DataError(f"{given}: no file matches.")
        return fixed, [p for p in paths if p.is_file()]
    raise DataError(f"{given}: no such file or folder.")


def _walk(root: Path) -> list[tuple[str, list[str]]]:
    """(folder, sorted visible file names) for root and everything under it."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}).") from error

    visited = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        visited.append((folder, sorted(n for n in names if not n.startswith("."))))
    return visited


def _without_suffix(name: str) -> str:
    return name[: -len(Path(name).suffix)]
