"""Training checkpoints: safetensors and JSON in one folder per step, atomic and hashed; signals that request one.

    checkpoints/step-00000500/{model,ema,optimizer}.safetensors, state.json

A folder gets its final name only when every file in it is complete and on the disk; ``state.json`` holds the SHA-256 of
each, so that the newest intact checkpoint can be found.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from v2flow_cli.errors import ModelError
from v2flow_cli.runtime.permissions import set_default_mode
from v2flow_cli.runtime.publishing import flush
from v2flow_cli.store.files import sha256_of

FORMAT_VERSION = 1
STATE = "state.json"
_NAME = re.compile(r"(?:step|checkpoint)-(\d+)")
_KNOWN_INTACT: set[Path] = set()  # checkpoints that this process wrote or has verified


class Interrupted(Exception):
    """SIGTERM or Ctrl-C arrived; the run was saved at ``step``."""

    def __init__(self, step: int) -> None:
        super().__init__(f"interrupted and saved at step {step}")
        self.step = step


def save_checkpoint(
    root: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write ``groups`` (name -> tensors) and ``state`` (JSON) for ``step`` and drop all but the newest ``keep``.

    Raises:  ModelError if it cannot be written.
    """
    final = root / f"step-{step:08d}"
    partial = root / f".{final.name}.partial"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for stale in root.glob(".step-*.partial"):  # of a run that was killed while writing
            shutil.rmtree(stale)
        partial.mkdir()
        hashes = {}
        for name, tensors in groups.items():
            file = partial / f"{name}.safetensors"
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, file)
            set_default_mode(file)
            hashes[file.name] = sha256_of(file)
        record = {"format_version": FORMAT_VERSION, "step": step, "sha256": hashes, "state": dict(state)}
        (partial / STATE).write_text(json.dumps(record, indent=1), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            flush(path)
        if final.exists():  # a damaged one, from which the run did not resume
            shutil.rmtree(final)
        os.replace(partial, final)
        flush(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ModelError(f"{final}: the checkpoint cannot be written ({error}). Earlier ones are untouched.") from None
    rotate(root, final, keep, _damage)
    return final


def rotate(root: Path, newest: Path, keep: int, damage: Callable[[Path], str]) -> None:
    """Remove all checkpoints in ``root`` up to ``newest``, just written, but the newest ``keep`` without ``damage``.

    A damaged one does not count: a good one is not removed in its favour. Those of this process are not read again.
    Later ones, from which the run did not resume, stay.
    """
    intact = 0
    _KNOWN_INTACT.add(newest)
    folders = list_checkpoints(root)
    for folder in reversed(folders[: folders.index(newest) + 1]):
        if intact == keep:
            shutil.rmtree(folder)
        elif folder in _KNOWN_INTACT or not damage(folder):
            _KNOWN_INTACT.add(folder)
            intact += 1


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders under ``root``, of ``loop`` or of Trainer, oldest first."""
    # A user's copy, such as step-00000500-best, is ignored.
    matches = [(_NAME.fullmatch(path.name), path) for path in root.glob("*-*") if path.is_dir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


def newest_checkpoint(root: Path, damage: Callable[[Path], str], log: Callable[[str], None]) -> Path | None:
    """The newest checkpoint without ``damage``; None if there is none.  Damaged ones are skipped and logged.

    Raises:  ModelError if all checkpoints are damaged.
    """
    folders = list_checkpoints(root)
    for folder in reversed(folders):
        if not (problem := damage(folder)):
            return folder
        log(f"{folder} is damaged ({problem}); trying the one before it")
    if folders:
        raise ModelError(f"{root}: all {len(folders)} checkpoints are damaged; remove the folder to start again.")
    return None


def changed_file(folder: Path, hashes: Mapping[str, str]) -> str:
    """The first of the files in ``folder`` that is missing or does not match its SHA-256; empty if there is none."""
    for name, digest in hashes.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256_of(folder / name) != digest:
            return f"{name} has changed"
    return ""


def load_newest(
    root: Path, log: Callable[[str], None] = lambda message: None
) -> tuple[Path, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """(folder, groups, state) of the newest intact checkpoint; None if there is none.  Raises: as ``newest_record``."""
    if (newest := newest_record(root, log)) is None:
        return None
    folder, record = newest
    groups = {Path(name).stem: load_file(folder / name) for name in record["sha256"]}
    return folder, groups, record["state"]


def newest_record(root: Path, log: Callable[[str], None] = lambda message: None) -> tuple[Path, dict[str, Any]] | None:
    """Folder and ``state.json`` of the newest intact checkpoint, or None.  Raises: as ``newest_checkpoint``."""
    folder = newest_checkpoint(root, _damage, log)
    record = _read_state(folder) if folder else None
    return (folder, record) if folder and record else None


def _damage(folder: Path) -> str:
    record = _read_state(folder)
    return f"no readable {STATE}" if record is None else changed_file(folder, record["sha256"])


def _read_state(folder: Path) -> dict[str, Any] | None:
    """The checked ``state.json`` of a checkpoint; None if it is missing or damaged."""
    try:
        record = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("sha256"), dict):
        return None
    version = record.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ModelError(f"{folder}: written by a newer v2flow (checkpoint format {version}); update v2flow.")
    return record


@contextlib.contextmanager
def stop_requested() -> Iterator[list[int]]:
    """A list that becomes non-empty when SIGTERM or SIGINT arrives; the step in progress is finished first."""
    received: list[int] = []
    previous = {}

    def handler(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        received.append(number)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread, as in some notebooks and test runners
        pass
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
