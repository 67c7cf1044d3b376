"""The one place where an exception of other people's code becomes our error."""

import csv
import tarfile
import zlib

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import given

from v2flow_cli.errors import REASON_CHARS, DataError, ModelError, TokenFileError, foreign_errors, reason_of

KINDS = [ValueError, KeyError, OSError, RuntimeError, csv.Error, tarfile.TarError, zlib.error, yaml.YAMLError]


@given(st.sampled_from(KINDS), st.text(st.characters(), max_size=2 * REASON_CHARS))  # lone surrogates among them
def test_any_exception_becomes_one_printable_sentence(kind, text):
    with pytest.raises(DataError) as caught, foreign_errors("a.csv: cannot be read", "Save it again.", DataError):
        raise kind(text)
    message = str(caught.value)
    assert message.startswith("a.csv: cannot be read (") and message.endswith("). Save it again.")
    assert message.isprintable() and len(message) <= REASON_CHARS + 60
    assert isinstance(caught.value.__cause__, kind)


def test_our_errors_and_interrupts_pass_unchanged():
    for error in (TokenFileError("as it was"), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)) as caught, foreign_errors("never said"):
            raise error
        assert caught.value is error


def test_a_panic_of_a_rust_library_is_an_error():
    """PyO3 derives them from BaseException, so that `except Exception` misses them."""
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(ModelError, match=r"tokenizer.json: cannot be read \(index out of bounds\)"):
        with foreign_errors("tokenizer.json: cannot be read"):
            raise panic("index out of bounds")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("eos"), "KeyError: 'eos'"),
        (ValueError(), "ValueError"),
        (FileNotFoundError(2, "No such file or directory", "a"), "No such file or directory"),
        (ValueError("two\n  lines.\n"), "two lines"),
        (ValueError("\x1b[31mred\udc80"), "\\x1b[31mred\\udc80"),
    ],
)
def test_reasons(error, reason):
    assert reason_of(error) == reason
