"""Training checkpoints: safetensors and JSON in one folder per step, atomic and hashed; signals that request one.

    checkpoints/step-00000500/{model,ema,optimizer}.safetensors, state.json

A folder gets its final name only when every file in it is complete and on the disk; ``state.json`` holds the SHA-256 of
each, so that the newest intact checkpoint can be found.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
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
        (partial / "state.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            flush(path)
        if final.exists():  # a damaged one, from which the run did not resume
            shutil.rmtree(final)
        os.replace(partial, final)
        flush(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ModelError(f"{final}: the checkpoint cannot be written ({error}). Earlier ones are untouched.") from None
    rotate([path for path in list_checkpoints(root) if path <= final], keep, _is_intact)  # later ones are damaged
    return final


def rotate(folders: Sequence[Path], keep: int, is_intact: Callable[[Path], bool]) -> None:
    """Remove all of ``folders`` (oldest first, the last one just written) but the newest ``keep`` intact ones.

    A damaged one does not count: a good one is not removed in its favour. Those of this process are not read again.
    """
    intact = 0
    _KNOWN_INTACT.add(folders[-1])
    for folder in reversed(folders):
        if intact == keep:
            shutil.rmtree(folder)
        elif folder in _KNOWN_INTACT or is_intact(folder):
            _KNOWN_INTACT.add(folder)
            intact += 1


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders under ``root``, oldest first."""
    # A user's copy, such as step-00000500-best, is ignored.
    return sorted(path for path in root.glob("step-*") if path.name[5:].isdigit() and path.is_dir())


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
    """Folder and ``state.json`` of the newest checkpoint whose files match their hashes; None if there is none.

    Damaged ones are skipped and logged.

    Raises:  ModelError if all checkpoints are damaged.
    """
    folders = list_checkpoints(root)
    for folder in reversed(folders):
        record = _read_state(folder)
        if record is not None and _is_intact(folder):
            return folder, record
        log(f"{folder}: damaged, skipped for an older checkpoint")
    if folders:
        raise ModelError(f"{root}: all {len(folders)} checkpoints are damaged; remove the folder to start again.")
    return None


def _is_intact(folder: Path) -> bool:
    record = _read_state(folder)
    return record is not None and all(
        (folder / name).is_file() and sha256_of(folder / name) == digest for name, digest in record["sha256"].items()
    )


def _read_state(folder: Path) -> dict[str, Any] | None:
    """The checked ``state.json`` of a checkpoint; None if it is missing or damaged."""
    try:
        record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
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
