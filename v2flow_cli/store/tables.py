"""Tables of users: captions of images as CSV, TSV or JSON lines, and names of class folders.

They are read strictly: an open quote, an extra field or a line that is no JSON is an error with its line, because each
of them would assign captions to other images or lose rows silently.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from v2flow_cli.errors import DataError
from v2flow_cli.store.captions import CAPTION_FIELDS
from v2flow_cli.store.images import SUFFIXES
from v2flow_cli.store.names import suffix_of
from v2flow_cli.store.text import lines_of, load_json, one_line, read_text

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
IMAGE_FIELDS = ("file", "image", "path", "file_name", "filename", "img_path")
_DELIMITERS = (",", ";", "\t")
_LONGEST_FIELD = 1_000_000  # characters; some captions exceed Python's own limit of 131,072

csv.field_size_limit(_LONGEST_FIELD)


def read_caption_table(table: Path) -> Iterator[tuple[int, str, list[str]]]:
    """(line, image, captions) of each row of a table; blank captions left out.

    Its columns are one of IMAGE_FIELDS and one of CAPTION_FIELDS, in any case, delimited by commas, semicolons or tabs.
    Raises: DataError, with the line, for a table that is damaged or lacks these columns.
    """
    jsonl = table.suffix.lower() == ".jsonl"
    for number, row in _json_rows(table) if jsonl else _csv_rows(table):
        fields = {str(name).strip().lower(): value for name, value in row.items()}
        image = next((fields[c] for c in IMAGE_FIELDS if isinstance(fields.get(c), str) and fields[c].strip()), None)
        text = next((fields[c] for c in CAPTION_FIELDS if fields.get(c) is not None), None)
        texts = [text] if isinstance(text, str) else text
        if image is None or not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            raise DataError(
                f"{table}: row {number} needs an image ({', '.join(IMAGE_FIELDS)}) and a caption or a list of them "
                f"({', '.join(CAPTION_FIELDS)}); found {_excerpt(row)}."
            )
        yield number, image.strip(), [one_line(t) for t in texts if t.strip()]


def _excerpt(row: dict[str, Any]) -> str:
    text = ", ".join(f"{name}: {str(value)[:30]!r}" for name, value in list(row.items())[:6])
    return text or "nothing"


def _csv_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = lines_of(read_text(table))
    header, delimiter = _header(table, lines)
    reader = csv.reader(
        (f"{line}\n" for line in lines), delimiter=delimiter, strict=True, skipinitialspace=delimiter != "\t"
    )
    number = 1  # of the line in which a row begins
    try:
        for row in reader:
            first, number = number, reader.line_num + 1
            if first == 1 or not any(field.strip() for field in row):
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{table}: row {first} has {len(row)} fields, the header {len(header)} ({', '.join(header)}). "
                    "Quote captions that contain commas or quotes."
                )
            _check_open_quote(table, first, row, delimiter)
            yield first, dict(zip(header, row))
    except csv.Error as error:
        last = f" to {reader.line_num}" if reader.line_num > number else ""
        raise DataError(
            f"{table}: line {number}{last} cannot be read ({error}). A quote inside a field is doubled, and a "
            f"field that begins with a quote ends with one; a field has at most {_LONGEST_FIELD:,} characters."
        ) from None


def _header(table: Path, lines: Sequence[str]) -> tuple[list[str], str]:
    """The names of the columns and the delimiter.  Raises: DataError if a required column is missing."""
    first = lines[0] if lines else ""
    for delimiter in _DELIMITERS:
        try:
            fields = next(csv.reader([first], delimiter=delimiter, skipinitialspace=True), [])
        except csv.Error:
            break
        names = [field.strip().lower() for field in fields]
        if set(names) & set(IMAGE_FIELDS) and set(names) & set(CAPTION_FIELDS):
            if len(set(names)) < len(names):
                raise DataError(f"{table}: the header {first!r} names a column twice.")
            return [field.strip() for field in fields], delimiter
    raise DataError(
        f"{table}: the first line is {first[:120]!r}; expected a header that names a column of images "
        f"({', '.join(IMAGE_FIELDS)}) and one of captions ({', '.join(CAPTION_FIELDS)}), with commas, semicolons or "
        f"tabs between them.{' Its lines end in CR: save it with LF or CRLF.' if chr(13) in first else ''}"
    )


def _check_open_quote(table: Path, first: int, row: Sequence[str], delimiter: str) -> None:
    """Raises: DataError if a field of several lines contains rows, that is, lines that begin with an image."""
    for field in row:
        for offset, line in enumerate(field.split("\n")[1:], 1):
            start, separator, _ = line.partition(delimiter)
            if separator and suffix_of(start.strip(), SUFFIXES):
                raise DataError(
                    f"{table}: the quote that opens in line {first} is not closed before line {first + offset}, which "
                    f"begins with {start.strip()!r}. Close it, or double quotes inside a field."
                )


def _json_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines_of(read_text(table)), 1):
        if line.strip():
            try:
                row = load_json(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{table}: row {number} is not JSON ({error}).") from error
            yield number, row if isinstance(row, dict) else {}


def read_class_names(path: Path) -> dict[str, str]:
    """Names of class folders, a line each: ``n02119022 red fox, Vulpes vulpes`` (the first name counts).

    Raises: DataError for a file that cannot be read, a line without a name, or a folder that has two.
    """
    names: dict[str, str] = {}
    for number, line in enumerate(lines_of(read_text(path)), 1):
        folder, *rest = line.split(maxsplit=1)[:2] or [""]
        name = rest[0].split(",")[0].strip() if rest else ""
        if folder and not name:
            raise DataError(f"{path}: line {number} is {line!r}; expected a folder, a space and a name.")
        if names.get(folder, name) != name:
            raise DataError(f"{path}: line {number} names {folder} {name!r}, an earlier one {names[folder]!r}.")
        if folder:
            names[folder] = name
    return names
