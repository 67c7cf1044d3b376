"""The failures a user can fix. Everything else is a bug and keeps its traceback.

A message says what failed, where, what was found, what was expected, and what to try. ``foreign_errors`` is the one
place where an exception of another library becomes such a message.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

REASON_CHARS = 300  # most characters of another library's message that are repeated


class V2FlowError(Exception):
    """A failure the user can fix; the command line prints its message alone and exits with 1."""


class RecipeError(V2FlowError):
    """A recipe that cannot be read, or whose keys or values do not fit the schema."""


class DataError(V2FlowError):
    """Images, captions or shards that are missing, unreadable or unsafe."""


class UnwritableName(DataError):
    """A file name that the file system does not accept; other files can be written beside it."""


class TokenFileError(V2FlowError):
    """A token file or manifest that cannot be read, or was written by another tokenizer."""


class ModelError(V2FlowError):
    """A model folder or checkpoint that is missing, damaged or of another shape than expected."""


class SharedError(V2FlowError):
    """An error of one process of a launch, which all others raise too, with the same message."""


@contextmanager
def foreign_errors(message: str, advice: str = "", kind: type[V2FlowError] = ModelError) -> Iterator[None]:
    """Turn any exception of the block into ``kind``: "MESSAGE (REASON). ADVICE".

    It wraps calls of other libraries on input from outside: chat templates, models, tokenizers, csv, tar, Pillow, the
    hub, safetensors, YAML. They raise exceptions of any class, so none is listed. A V2FlowError and an interrupt pass
    unchanged.
    """
    try:
        yield
    except V2FlowError:
        raise
    except BaseException as error:
        # A panic of a Rust library derives from BaseException (PyO3), as an interrupt does.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{message} ({reason_of(error)}).{advice and f' {advice}'}") from error


def reason_of(error: BaseException) -> str:
    """The message of ``error`` on one printable line of at most ``REASON_CHARS`` characters, without a full stop.

    Its class is added if the text is empty, and for a KeyError, whose text is only the key.
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, KeyError) or not text.strip():
        text = f"{type(error).__name__}: {text}" if text.strip() else type(error).__name__
    line = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return (line if len(line) <= REASON_CHARS else f"{line[: REASON_CHARS - 3]}...").rstrip(".")


def did_you_mean(name: object, names: Iterable[str], prefix: str = "") -> str:
    """ "; did you mean PREFIXNAME?" with the nearest of ``names``; empty if none is near."""
    near = difflib.get_close_matches(str(name), list(names), n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
