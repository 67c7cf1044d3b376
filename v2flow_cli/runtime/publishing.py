"""Folders whose files are replaced together: a reader sees the old files, or the new ones, or is refused.

    model/.saving-k3x9/      the new files while they are written; the old ones lie untouched in model/
    model/.saving-complete/  the same, once all of them are on the disk; then they move into model/

A process that is killed before the rename leaves the old files. One that is killed while the files move leaves the
folder ``complete``, which readers refuse and the next writer moves first.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from v2flow_cli.errors import ModelError, V2FlowError
from v2flow_cli.runtime.permissions import set_default_mode

MODEL, TARS = ".saving-", ".tars-"  # prefixes for the files of a model folder, and for a set of tars
WEIGHTS = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"  # of a model: in one file, or in several
_COMPLETE, _NAMES = "complete", ".names.json"


@contextlib.contextmanager
def publishing(target: Path, prefix: str = MODEL, replaces: str = WEIGHTS) -> Iterator[Path]:
    """A folder to fill; its files move into ``target`` when the block ends well.

    Args:   prefix, of hidden folders in ``target`` in which nobody else may be writing: what killed writers left
            there is finished or removed; replaces, a regular expression: a file in ``target`` whose whole name fits
            it goes unless a new one has that name, such as the second half of weights that are one file now.
    Raises: OSError.
    """
    target.mkdir(parents=True, exist_ok=True)
    complete = target / f"{prefix}{_COMPLETE}"
    if complete.is_dir():
        _move(complete, target, replaces)
    for stale in target.glob(f"{prefix}*"):
        shutil.rmtree(stale)
    partial = Path(tempfile.mkdtemp(dir=target, prefix=prefix))
    try:
        yield partial
        for path in filter(Path.is_file, list(partial.iterdir())):
            set_default_mode(path)
        names = sorted((path.name for path in partial.iterdir()), key=lambda name: (name == "config.json", name))
        (partial / _NAMES).write_text(json.dumps(names), encoding="utf-8")
        for path in (*partial.rglob("*"), partial):
            flush(path)
        os.replace(partial, complete)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone after the replace
    _move(complete, target, replaces)


def check_published(folder: Path, prefix: str = MODEL, error: type[V2FlowError] = ModelError) -> None:
    """Raises: ``error`` where the files in ``folder`` are being replaced, or that was interrupted, or cannot be read.

    safetensors says of a file without permission that it does not exist.
    """
    closed = [folder] if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK) else []
    closed += [file for file in folder.glob("*.safetensors") if file.is_file() and not os.access(file, os.R_OK)]
    if closed:
        raise error(f"{closed[0]}: cannot be read (Permission denied).")
    if (folder / f"{prefix}{_COMPLETE}").is_dir():
        raise error(
            f"{folder}: its files are being replaced, or that was interrupted. Repeat the command that wrote them (of "
            "a training, with --resume)."
        )


def _move(complete: Path, target: Path, replaces: str) -> None:
    """``config.json`` goes first and comes last: other programs do not read a folder without it either."""
    if (complete / _NAMES).exists():  # else all have moved
        names: list[str] = json.loads((complete / _NAMES).read_text(encoding="utf-8"))
        if (complete / "config.json").exists():
            (target / "config.json").unlink(missing_ok=True)
        for old in target.iterdir():
            if re.fullmatch(replaces, old.name) and old.name not in names:
                old.unlink()
        for name in names:
            if (complete / name).exists():
                if (complete / name).is_dir():
                    shutil.rmtree(target / name, ignore_errors=True)
                os.replace(complete / name, target / name)
        flush(target)
        (complete / _NAMES).unlink()
    complete.rmdir()


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
