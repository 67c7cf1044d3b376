"""Decodes text: captions, tables, class names, prompts, lists of keys, and our own JSON lines.

Text is UTF-8 with or without a byte order mark, or UTF-16 or UTF-32 with one. A line ends only at ``\\n`` or
``\\r\\n``: U+2028, U+0085, a form feed or a lone ``\\r``, at which ``str.splitlines`` splits, are characters of a
caption. Surrogates, which represent bytes that are no text, are escaped.
"""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

from v2flow_cli.errors import DataError

_BOMS = (  # the longer ones first: that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f]")  # which no text has, but UTF-16 that is read as UTF-8
SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # in JSON


def decode_text(content: bytes, name: str | Path, errors: str = "strict") -> str:
    """``content`` as text, by its byte order mark; without one UTF-8, or UTF-16 where the zero bytes show it.

    Args:   name, of the content in messages; errors, "replace" puts U+FFFD for bytes that are not text.
    Raises: DataError with the line of the first byte that is not text.
    """
    mark, encoding = next(((m, e) for m, e in _BOMS if content.startswith(m)), (b"", _without_mark(content)))
    content = content[len(mark) :]
    try:
        return printable(content.decode(encoding, errors))
    except UnicodeDecodeError as error:
        lines_before = content[: error.start].decode(encoding, "replace").count("\n")
        label = encoding[:6].upper().rstrip("-")
        raise DataError(
            f"{name}: cannot be read as {label} text (line {lines_before + 1}: {error.reason}, byte "
            f"0x{content[error.start]:02x}). Save it as UTF-8."
        ) from None


def _without_mark(content: bytes) -> str:
    """UTF-8; or UTF-16 where three of four bytes at even or odd places are zero, as of Latin letters, and no others."""
    even, odd = content[::2].count(0), content[1::2].count(0)
    if len(content) % 2 or not content or min(even, odd) or max(even, odd) * 8 < len(content) * 3:
        return "utf-8"
    return "utf-16-le" if odd else "utf-16-be"


def read_text(path: Path) -> str:
    """The text of a file.  Raises: DataError if it cannot be read or is not text."""
    try:
        return decode_text(path.read_bytes(), path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error.strerror or error}).") from None


def lines_of(text: str) -> list[str]:
    """The lines of ``text`` without their ends, and without byte order marks, which joined files have inside.

    A last line without an end is one as well.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.replace("\ufeff", "") for line in lines]


def whole_lines(content: bytes) -> list[str]:
    """The complete lines of our own files; a killed process may leave a last line without an end.

    Raises: UnicodeDecodeError (a ValueError) for a damaged file.
    """
    return content[: content.rfind(b"\n") + 1].decode("utf-8").split("\n")[:-1]  # half a line may end in half a letter


def one_line(text: str) -> str:
    """``text`` with every run of white space, including line ends, replaced by one space."""
    return " ".join(text.split())


def printable(text: str) -> str:
    """``text`` with surrogates as ``\\xNN`` (a byte of a file name or argument that is not UTF-8) or ``\\uNNNN``."""
    return SURROGATE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def load_json(text: str | bytes) -> Any:
    """The value of a JSON text, with surrogates in its strings escaped.  Raises: ValueError, RecursionError."""
    content = text if isinstance(text, str) else decode_text(text, "JSON")
    value = json.loads(content.removeprefix("\ufeff"))
    return _printable_in(value) if _ESCAPED_SURROGATE.search(content) else value


def _printable_in(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(key): _printable_in(item) for key, item in value.items()}
    return [_printable_in(item) for item in value] if isinstance(value, list) else value
