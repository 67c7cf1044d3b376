"""The rules themselves, over names, bytes and tables that nobody thought of (Hypothesis)."""

import csv
import io
import json
import os
import tempfile
import unicodedata
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from v2flow_cli.errors import DataError
from v2flow_cli.store.images import SUFFIXES
from v2flow_cli.store.names import (
    TAR_SUFFIXES,
    keys_of,
    safe_key,
    safe_prefixes,
    suffix_of,
    temporary_name,
)
from v2flow_cli.store.not_taken import NotTaken
from v2flow_cli.store.paths import same_place
from v2flow_cli.store.tables import read_caption_table
from v2flow_cli.store.text import decode_text, lines_of, load_json, one_line, printable

slow = settings(deadline=None, max_examples=200)  # the machine that runs them may be busy
anything = st.text(st.characters(), max_size=40)  # surrogates included
# NUL at the start of UTF-16 is the byte order mark of UTF-32.
no_surrogates = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
file_names = st.binary(min_size=1, max_size=60).map(lambda b: os.fsdecode(b.replace(b"/", b"_").replace(b"\0", b"_")))
suffixes = st.sampled_from([*sorted(SUFFIXES), ".JPG", ".Png", ".tar.png", ""])


@slow
@given(anything)
def test_printable_text_can_be_written_and_stays(text):
    clean = printable(text)
    assert (clean.encode() and clean) or not text
    assert printable(clean) == clean
    assert clean == text or any("\ud800" <= c <= "\udfff" for c in text)


@slow
@example(["a\ufeffb", "\ufeffc"])
@given(st.lists(no_surrogates.filter(lambda t: "\n" not in t and not t.endswith("\r") and not t.startswith("\ufeff"))))
def test_lines_are_those_that_were_written(lines):
    expected = [line.replace("\ufeff", "") for line in lines]  # byte order marks are no text
    for end in ("\n", "\r\n"):
        text = "".join(f"{line}{end}" for line in lines)
        for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
            if encoding == "utf-8" and text.startswith("\ufeff"):
                continue
            assert lines_of(decode_text(text.encode(encoding), "x")) == expected


@slow
@given(st.binary())
def test_any_bytes_are_text_or_one_error(content):
    try:
        decode_text(content, "x").encode()
    except DataError as error:
        assert str(error).startswith("x: cannot be read as UTF-")
    decode_text(content, "x", errors="replace").encode()


@slow
@given(st.recursive(anything, lambda inner: st.lists(inner) | st.dictionaries(anything, inner), max_leaves=8))
def test_any_json_comes_back_printable(value):
    def flat(item):
        if isinstance(item, dict):
            return [part for pair in item.items() for each in pair for part in flat(each)]
        return [part for each in item for part in flat(each)] if isinstance(item, list) else [item]

    for text in flat(load_json(json.dumps(value))):
        text.encode()


@slow
@given(st.lists(anything | file_names, max_size=12))
def test_safe_keys_are_safe_and_unique_on_any_file_system(names):
    taken: set[str] = set()
    keys = [safe_key(name, taken) for name in names]
    folded = {unicodedata.normalize("NFC", key).casefold() for key in keys}
    assert len(folded) == len(keys) == len(taken)
    for key in keys:
        key.encode()
        assert key and not key.startswith("/") and "." not in key
        for part in key.split("/"):
            assert 0 < len(part.encode()) <= 230 and part == part.rstrip(" ") and part.upper() not in ("CON", "NUL")
        assert safe_key(key).casefold() == key.casefold() or len(key.encode()) > 200


@slow
@given(
    st.lists(st.lists(st.sampled_from(["a", "b", "a.b", "A", "c "]), min_size=1, max_size=3).map("/".join), unique=True)
)
def test_what_lies_under_safe_prefixes_stays_apart(keys):
    prefixes = safe_prefixes(keys)
    for i, one in enumerate(prefixes):
        for j, other in enumerate(prefixes):
            assert i == j or not f"{other}/".casefold().startswith(f"{one}/".casefold())


@slow
@given(st.lists(st.tuples(st.sampled_from(["/r", "/r/s", "/other/r"]), file_names, suffixes), max_size=12, unique=True))
def test_keys_of_files_are_unique_and_writable(files):
    paths = [(Path(root), Path(root, f"{name}{suffix}")) for root, name, suffix in files]
    paths = [(root, path) for root, path in dict.fromkeys(paths) if path.name not in ("", ".", "..")]
    paths = list({path: (root, path) for root, path in paths if root in path.parents}.values())
    keys = keys_of(paths, SUFFIXES)
    assert len(set(keys)) == len(keys) == len(paths)
    for key in keys:
        key.encode()
        assert all(len(f"{part}.samples.jsonl".encode()) <= 255 for part in key.split("/"))
    assert keys == keys_of(paths, SUFFIXES)


@slow
@given(file_names, st.sampled_from([*sorted(SUFFIXES), *TAR_SUFFIXES]))
def test_suffixes_have_no_case(name, suffix):
    everything = {*SUFFIXES, *TAR_SUFFIXES}
    for written in (suffix, suffix.upper(), suffix.title()):
        assert suffix_of(f"{name}{written}", everything).endswith(suffix)


@slow
@given(file_names)
def test_temporary_names_are_short_and_hidden(name):
    assert len(temporary_name(name)) < 60 and temporary_name(name).startswith(".")
    assert temporary_name(name) == temporary_name(name) and temporary_name(name).isascii()


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)


@slow
@example([("", "\ufeff"), ("", "a\ufeffb")], ",", "\n")
@given(st.lists(st.tuples(cells, cells), max_size=8), st.sampled_from(",;\t"), st.sampled_from(["\n", "\r\n"]))
def test_a_table_gives_back_every_row_or_an_error_with_its_line(rows, delimiter, end):
    """Written by the csv module with every quote that a field needs; and then with an open one."""
    rows = [(f"{i}.png", caption) for i, (_, caption) in enumerate(rows)]
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("file", "caption"), *rows])
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "t.csv")
        table.write_bytes(buffer.getvalue().encode())
        try:
            found = [(name, texts) for _, name, texts in read_caption_table(table)]
            texts = [(name, text.replace("\ufeff", "")) for name, text in rows]  # byte order marks are no text
            assert found == [(name, [one_line(text)] if text.strip() else []) for name, text in texts]
        except DataError as error:  # a caption that looks like rows that an open quote swallowed
            assert "is not closed before line" in str(error)
        table.write_bytes(buffer.getvalue().encode() + f'last.png{delimiter}"open'.encode())
        try:
            list(read_caption_table(table))
            raise AssertionError("an open quote was accepted")
        except DataError as error:
            assert "line " in str(error)


@slow
@given(st.lists(st.tuples(anything, st.sampled_from([".heic files", "links"]), st.sampled_from(["a", "b"]))))
def test_what_is_not_taken_is_counted_exactly(things):
    one, two = NotTaken(), NotTaken()
    for i, thing in enumerate(things):
        (one, two)[i % 2].add(*thing)
    one.merge(NotTaken.load(two.dump()))
    assert sum(group["count"] for group in one.as_json()) == len(things)
    assert bool(one) == bool(things)
    for line in one.lines():
        line.encode()


@slow
@given(st.lists(st.sampled_from(["a", "b", "..", ".", ""]), max_size=6))
def test_paths_that_lead_to_one_place_are_one(parts):
    path = "/".join(["/tmp/none", *parts])
    assert same_place(path, f"{path}/") and same_place(path, os.path.normpath(path))
