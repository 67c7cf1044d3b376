"""The rule for paths that a user gives: ``~``, trailing slashes, relative or absolute, links, output against input."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from v2flow_cli.errors import DataError

_FILE_SUFFIXES = frozenset(
    ".png .jpg .jpeg .webp .gif .bmp .tif .tiff .avif .npy .npz .tar .tgz .gz .zip .json .jsonl .csv .tsv .txt .yaml "
    ".yml .html .pdf .safetensors".split()
)


def user_path(text: str | os.PathLike[str]) -> Path:
    """The path that a user means: ``~`` and ``~name`` are home folders, whoever expands them or not."""
    return Path(text).expanduser()


def real_path(path: str | os.PathLike[str]) -> str:
    """The absolute path behind links, ``..``, ``~`` and trailing slashes; it need not exist."""
    return os.path.realpath(user_path(path))


def same_place(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    """True where two paths lead to the same file or folder, also through links or in another case."""
    try:
        return os.path.samefile(user_path(first), user_path(second))
    except OSError:  # one of them does not exist (yet)
        return real_path(first) == real_path(second)


def is_inside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """True where ``path`` is ``folder`` or lies under it, behind links."""
    inner, outer = real_path(path), real_path(folder)
    return inner == outer or inner.startswith(os.path.join(outer, ""))


def check_apart(out: Path, inputs: Iterable[str | os.PathLike[str]], what: str = "-o") -> None:
    """Refuse an output folder that is an input, or that an input file lies in: writing would change what is read.

    An output folder inside an input folder is allowed; whoever searches the input leaves it out.
    Raises: DataError that names both.
    """
    for given in map(user_path, inputs):
        folder = given.parent if given.is_file() else given
        if same_place(out, folder):
            raise DataError(
                f"{what} {out}: the same folder as the input {given}; what is written would mix with what is read. "
                "Give another folder, which may lie inside it."
            )


def names_a_picture(out: str | os.PathLike[str], pictures: int) -> bool:
    """True where ``out`` is the name for one PNG file (``fox.png``) rather than a folder.

    Raises: DataError where it is, and there is not one picture but several, or none.
    """
    path = user_path(out)
    if path.suffix.lower() != ".png" or path.is_dir():
        return False
    if pictures != 1:
        raise DataError(f"-o {path}: the name of one picture, but there are {pictures}. Give a folder.")
    return True


def output_folder(given: str | os.PathLike[str], what: str = "-o") -> Path:
    """The folder that a user means by ``given``.

    Raises: DataError for a name that is a file's (``fox.png``), unless there is such a folder, and for a file.
    """
    out = user_path(given)
    if out.is_dir():
        return out
    if out.exists() or out.is_symlink():
        raise DataError(f"{what} {out}: a file; expected a folder, which is made where there is none.")
    if out.suffix.lower() in _FILE_SUFFIXES:
        raise DataError(
            f"{what} {out}: the name of a file; expected a folder. Give {out.with_suffix('')}, or make {out} first if "
            "it is to be a folder."
        )
    return out
