"""Image files to 8-bit RGB, or a DataError. ``find.py`` finds them."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from v2flow_cli.errors import DataError
from v2flow_cli.runtime.rgb import to_rgb

MAX_PIXELS = 50_000_000  # checked before decoding: a small file can declare any size

#: Formats that Pillow decodes itself; EPS, for example, would start another program.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .png .webp .avif .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm".split())

# Pillow warns of its own, larger limit and of damaged EXIF; here a file is either an image or a DataError.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def open_image(source: Path | bytes, name: str) -> Image.Image:
    """The image as 8-bit RGB, upright (EXIF), with alpha composited over white; the first frame of an animation.

    Args:   source, a file or the bytes of one; name, of the file in messages.
    Raises: DataError for anything but a complete image of at most MAX_PIXELS.
    """
    content = source if isinstance(source, bytes) else read_bytes(source)
    if not content:
        raise DataError(f"{name}: the file is empty (0 bytes); expected an image.")
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: more than the limit of {MAX_PIXELS:,} pixels. Make it smaller first.") from error
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


def image_bytes(image: Image.Image, kind: str, **options: Any) -> bytes:
    """A file of ``image`` in a format of Pillow's ``save``, with its options."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_bytes(image: Image.Image, info: PngInfo | None = None) -> bytes:
    """A PNG file of ``image``, with ``info`` as its text metadata."""
    return image_bytes(image, "PNG", pnginfo=info)


def read_bytes(path: Path) -> bytes:
    """The content of a file.  Raises: DataError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
