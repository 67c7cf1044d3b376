"""Paths that a user types: ``~``, trailing slashes, links, and output folders that overlap with inputs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from v2flow_cli.errors import DataError, reason_of
from v2flow_cli.store.text import printable

_FILE_SUFFIXES = frozenset(
    ".png .jpg .jpeg .webp .gif .bmp .tif .tiff .avif .npy .npz .tar .tgz .gz .zip .json .jsonl .csv .tsv .txt .yaml "
    ".yml .html .pdf .safetensors".split()
)


def user_path(text: str | os.PathLike[str]) -> Path:
    """The path that a user means: ``~`` and ``~name`` are home folders, whoever expands them or not.

    Raises: DataError where there is no user of that name, nor a file or folder that is called so.
    """
    given = os.fspath(text)
    try:
        os.fsencode(given)
    except UnicodeEncodeError:  # a lone surrogate, as JSON and YAML may spell one
        raise DataError(f"{printable(given)}: no name of a file; it holds half of a character.") from None
    path = os.path.expanduser(given)
    if path == given and given.startswith("~") and not os.path.lexists(given):
        user = Path(given).parts[0]
        raise DataError(f"{given}: there is no user {user[1:]}. Write ./{given} for a name that begins with ~.")
    return Path(path)


def real_path(path: str | os.PathLike[str]) -> str:
    """The absolute path without links, ``..``, ``~`` and trailing slashes; it need not exist."""
    return os.path.realpath(user_path(path))


def same_place(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    """True if two paths are the same file or folder, also through links or in another case."""
    try:
        return os.path.samefile(user_path(first), user_path(second))
    except OSError:  # one of them does not exist (yet)
        return real_path(first) == real_path(second)


def check_apart(out: Path, inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Raises: DataError if the output folder is an input, or the folder of an input file.

    An output folder inside an input folder is allowed, because the search of the input leaves it out.
    """
    for path in map(user_path, inputs):
        folder = path.parent if path.is_file() else path
        if same_place(out, folder):
            raise DataError(
                f"-o {out}: the same folder as the input {path}; outputs would mix with inputs. Use another "
                "folder, which may lie inside it."
            )


def not_writable(folder: Path) -> str:
    """Why no file can be made in ``folder``, which need not exist: "cannot be written (REASON)"; empty if one can."""
    nearest = folder
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent  # the nearest existing one has to be a folder that can be written
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return ""
    except OSError as error:
        because = f", because {nearest} cannot" if nearest != folder else ""
        return f"cannot be written{because} ({reason_of(error)})"


def check_writable(paths: Iterable[Path | None]) -> None:
    """Raises: DataError for a file that could not be written after hours of work: a folder, or in a closed one."""
    for path in filter(None, paths):
        if path.is_dir():
            raise DataError(f"{path}: a folder; expected the name of a file.")
        if problem := not_writable(path.parent):
            raise DataError(f"{path}: {problem}.")


def names_a_picture(out: str | os.PathLike[str], pictures: int) -> bool:
    """True if ``out`` names one PNG file (``fox.png``) rather than a folder.

    Raises: DataError if it does, but there is not exactly one picture.
    """
    path = user_path(out)
    if path.suffix.lower() != ".png" or path.is_dir():
        return False
    if pictures != 1:
        raise DataError(f"-o {path}: the name of one picture, but there are {pictures}. Use a folder.")
    return True


def output_folder(text: str | os.PathLike[str]) -> Path:
    """The output folder that ``text`` names.

    Raises: DataError for a file, and for the name of a file (``fox.png``) unless there is such a folder.
    """
    out = user_path(text)
    if out.is_dir():
        return out
    if out.exists() or out.is_symlink():
        raise DataError(f"-o {out}: a file; expected a folder, which need not exist.")
    above = next((folder for folder in out.parents if os.path.lexists(folder)), Path())
    if not above.is_dir():
        raise DataError(f"-o {out}: {above} is a file; expected a folder to make it in.")
    if out.suffix.lower() in _FILE_SUFFIXES:
        raise DataError(
            f"-o {out}: the name of a file; expected a folder. Use {out.with_suffix('')}, or create the folder "
            f"{out} first."
        )
    return out
