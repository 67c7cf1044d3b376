"""Shards on their way: written aside in a hidden folder, and moved to their place when the whole set is there.

    shards/.shard.partial/progress.jsonl      the options, a line for each whole shard, and a last one for the set
    shards/.shard.partial/shard-000000.tar    with its index
    shards/.replacing                         while the files move; readers refuse the folder meanwhile

So a set that is to be replaced stays as it is until the last byte of its successor is on the disk, and a run that is
killed at any point goes on when it is repeated.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from v2flow_cli.errors import DataError
from v2flow_cli.store.failures import Failure
from v2flow_cli.store.files import flush, write_bytes
from v2flow_cli.store.shard_index import (
    MANIFEST,
    REPLACING,
    ShardInfo,
    check_manifest_is_ours,
    index_path,
    load_manifest,
    save_manifest,
)

_AGAIN = "Repeat the same command on the same images, or start anew with --force."


@dataclass
class ShardReport:
    """The shards of a set, and each image that was left out."""

    shards: list[ShardInfo] = field(default_factory=list)
    captions: int = 0
    captioned: int = 0  # samples with a caption
    failures: list[Failure] = field(default_factory=list)
    kept_shards: int = 0  # finished by an earlier run

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


def shards_of_prefix(folder: Path, prefix: str) -> list[Path]:
    """The tars in ``folder`` that a set called ``prefix`` has or had, and no others: PREFIX-000000.tar, ..."""
    name = re.compile(rf"{re.escape(prefix)}-\d{{6,}}\.tar")
    return sorted(path for path in folder.glob("*.tar") if name.fullmatch(path.name))


def check_folder(folder: Path, prefix: str) -> None:
    """Refuse a folder whose manifest is not of this set, which writing it would lose, with ``--force`` or without.

    Raises: DataError for the manifest of tokens, of another prefix, or of another program.
    """
    check_manifest_is_ours(folder)
    if (folder / REPLACING).exists():  # this command can finish what was begun; readers cannot
        return
    own = re.compile(rf"{re.escape(prefix)}-\d{{6,}}\.tar")
    if others := [name for name in load_manifest(folder) if not own.fullmatch(name)]:
        raise DataError(
            f"{folder / MANIFEST}: lists {others[0]}, which is of another set than --prefix {prefix}; its digests "
            "would be lost. Use another -o."
        )


class StagedSet:
    """A set that is being written into ``out``, its finished shards, and what a repeated run has to know of them."""

    def __init__(self, out: Path, prefix: str, options: dict[str, Any]) -> None:
        self.out, self.prefix, self.options = out, prefix, options
        self.folder = out / f".{prefix}.partial"
        self._journal = self.folder / "progress.jsonl"
        self._failures = 0  # listed so far

    @property
    def exists(self) -> bool:
        """Whether a run has begun and not ended."""
        return self._journal.is_file()

    def begin(self) -> None:
        """Start anew; from here on a repeated run knows the shards as its own."""
        self.remove()
        write_bytes(self._journal, (json.dumps(self.options) + "\n").encode())

    def add(self, report: ShardReport, sources: int, seen: str, failures: int) -> None:
        """A shard more.  sources: how many were read for all of them; seen: their digest; failures: listed so far."""
        record = {
            "shard": asdict(report.shards[-1]),
            "captions": report.captions,
            "captioned": report.captioned,
            "sources": sources,
            "seen": seen,
            "failures": [f.as_json() for f in report.failures[self._failures : failures]],
        }
        self._failures = failures
        self._append(record)

    def resume(self, report: ShardReport) -> tuple[int, str]:
        """Take up the shards that are written and whole; returns how many sources they took, and their digest.

        Raises: DataError where they were written with other options.
        """
        options, records, complete = self._read()
        if options != self.options:
            raise DataError(f"{self._journal}: a stopped run with the options {json.dumps(options)}. {_AGAIN}")
        taken = 0, ""
        for record in records:
            info = ShardInfo(**record["shard"])
            path = self.folder / info.name
            whole = path.is_file() and path.stat().st_size == info.bytes and index_path(path).is_file()
            if not (complete or whole):
                break  # this one and those after it are written again
            report.shards.append(info)
            report.failures += map(Failure.from_json, record["failures"])
            report.captions, report.captioned = record["captions"], record["captioned"]
            taken = record["sources"], record["seen"]
        report.kept_shards, self._failures = len(report.shards), len(report.failures)
        return taken

    def others(self) -> DataError:
        """What to raise where the images are other ones than those the stopped run began with."""
        return DataError(f"{self._journal}: the images are not those that the stopped run began with. {_AGAIN}")

    def publish(self, report: ShardReport) -> None:
        """Put the finished set in the place of the one before it."""
        if not self._read()[2]:
            save_manifest(self.folder, report.shards, report.captions)
            for path in (*self.folder.iterdir(), self.folder):
                flush(path)
            self._append({"complete": True})
        self.finish_moving()
        self.remove()

    def finish_moving(self) -> None:
        """Move what a complete set has not moved yet; nothing where it is not complete."""
        if not self.exists or not self._read()[2]:
            return
        names = [record["shard"]["name"] for record in self._read()[1]]
        try:
            write_bytes(self.out / REPLACING, f"{self.prefix}\n".encode())
            for old in shards_of_prefix(self.out, self.prefix):
                if old.name not in names:
                    index_path(old).unlink(missing_ok=True)  # before its tar, by which a repeated run finds it
                    old.unlink()
            for name in (*names, *(index_path(Path(name)).name for name in names), MANIFEST):
                if (self.folder / name).exists():
                    os.replace(self.folder / name, self.out / name)
            flush(self.out)
            (self.out / REPLACING).unlink()
        except OSError as error:
            raise DataError(f"{self.out}: cannot be replaced ({error.strerror}). Repeat the command.") from error

    def remove(self) -> None:
        """Remove what is written aside."""
        try:
            if self.folder.is_dir():
                self._journal.unlink(missing_ok=True)  # first: what is left is then nobody's
                shutil.rmtree(self.folder)
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be removed ({error.strerror}).") from error

    def _append(self, record: dict[str, Any]) -> None:
        try:
            with open(self._journal, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(f"{self._journal}: cannot be written ({error.strerror}).") from error

    def _read(self) -> tuple[dict[str, Any], list[dict[str, Any]], bool]:
        """The options, a record for each shard, and whether the set is complete."""
        options, *lines = self._journal.read_bytes().split(b"\n")[:-1]  # the last line may be half of one
        records: list[dict[str, Any]] = [json.loads(line) for line in lines]
        # A shard that had to be written again has two.
        shards = {record["shard"]["name"]: record for record in records if "shard" in record}
        return json.loads(options), list(shards.values()), any("complete" in record for record in records)


def check_free(folder: Path, old: Iterable[Path]) -> None:
    """Raises: DataError where ``folder`` holds a set already."""
    found = next(iter([*old, *(path for path in [folder / MANIFEST] if path.exists())]), None)
    if found is not None:
        raise DataError(f"{found}: exists already. Use --force, or another -o.")
