"""Staging of a set of shards: written to a hidden folder, and moved when the set is complete.

    shards/.shard.partial/progress.jsonl      the options, a line for each complete shard, and a last one for the set
    shards/.shard.partial/shard-000000.tar    with its index
    shards/.replacing                         exists while the files move; readers refuse the folder meanwhile

An existing set stays unchanged until the new one is on the disk, and a run that is killed at any point can be
continued.
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
from v2flow_cli.runtime.publishing import flush
from v2flow_cli.store.failures import Failure
from v2flow_cli.store.files import append_line, write_bytes
from v2flow_cli.store.shard_index import (
    MANIFEST,
    REPLACING,
    ShardInfo,
    check_manifest_is_ours,
    index_path,
    load_manifest,
    save_manifest,
)

_ADVICE = "Repeat the same command on the same images, or start again with --force."


@dataclass
class ShardReport:
    """The shards of a set, and the failures."""

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
    """The tars in ``folder`` that belong to a set of this prefix: PREFIX-000000.tar, ..."""
    name = re.compile(rf"{re.escape(prefix)}-\d{{6,}}\.tar")
    return sorted(path for path in folder.glob("*.tar") if name.fullmatch(path.name))


def check_folder(folder: Path, prefix: str) -> None:
    """Raises: DataError if the folder has the manifest of tokens, of another prefix, or of another program.

    It would be overwritten, so ``--force`` does not matter.
    """
    check_manifest_is_ours(folder)
    if (folder / REPLACING).exists():  # this command can finish the replacement
        return
    own = re.compile(rf"{re.escape(prefix)}-\d{{6,}}\.tar")
    if others := [name for name in load_manifest(folder) if not own.fullmatch(name)]:
        raise DataError(
            f"{folder / MANIFEST}: lists {others[0]}, which belongs to another set than --prefix {prefix}; its "
            "digests would be lost. Use another -o."
        )


class StagedSet:
    """A set that is being written into ``out``, with a journal of its finished shards for a repeated run."""

    def __init__(self, out: Path, prefix: str, options: dict[str, Any]) -> None:
        self.out, self.prefix, self.options = out, prefix, options
        self.folder = out / f".{prefix}.partial"
        self._journal = self.folder / "progress.jsonl"
        self._failures = 0  # listed so far

    @property
    def exists(self) -> bool:
        """True if a run has begun and not ended."""
        return self._journal.is_file()

    def begin(self) -> None:
        """Start a new set, which a repeated run can continue."""
        self.remove()
        write_bytes(self._journal, (json.dumps(self.options) + "\n").encode())

    def add(self, report: ShardReport, sources: int, digest: str, failures: int) -> None:
        """Add the last shard.  sources: the number read so far; digest: of these; failures: listed so far."""
        record = {
            "shard": asdict(report.shards[-1]),
            "captions": report.captions,
            "captioned": report.captioned,
            "sources": sources,
            "seen": digest,
            "failures": [f.as_json() for f in report.failures[self._failures : failures]],
        }
        self._failures = failures
        self._append(record)

    def resume(self, report: ShardReport) -> tuple[int, str]:
        """Add the complete shards to ``report``; returns the number of their sources and the digest of these.

        Raises: DataError if they were written with other options.
        """
        options, records, complete = self._read()
        if options != self.options:
            raise DataError(f"{self._journal}: a stopped run with the options {json.dumps(options)}. {_ADVICE}")
        progress = 0, ""
        for record in records:
            info = ShardInfo(**record["shard"])
            path = self.folder / info.name
            intact = path.is_file() and path.stat().st_size == info.bytes and index_path(path).is_file()
            if not (complete or intact):
                break  # this shard and those after it are written again
            report.shards.append(info)
            report.failures += map(Failure.from_json, record["failures"])
            report.captions, report.captioned = record["captions"], record["captioned"]
            progress = record["sources"], record["seen"]
        report.kept_shards, self._failures = len(report.shards), len(report.failures)
        return progress

    def other_images(self) -> DataError:
        """The error if the images are not those of the stopped run."""
        return DataError(f"{self._journal}: the images are not those of the stopped run. {_ADVICE}")

    def publish(self, report: ShardReport) -> None:
        """Replace the older set by the complete one."""
        if not self._read()[2]:
            save_manifest(self.folder, report.shards, report.captions)
            for path in (*self.folder.iterdir(), self.folder):
                flush(path)
            self._append({"complete": True})
        self.finish_moving()
        self.remove()

    def finish_moving(self) -> None:
        """Move the files of a complete set that are not moved yet; does nothing for an incomplete set."""
        if not self.exists or not self._read()[2]:
            return
        names = [record["shard"]["name"] for record in self._read()[1]]
        try:
            write_bytes(self.out / REPLACING, f"{self.prefix}\n".encode())
            for old in shards_of_prefix(self.out, self.prefix):
                if old.name not in names:
                    index_path(old).unlink(missing_ok=True)  # before its tar, which a repeated run looks for
                    old.unlink()
            for name in (*names, *(index_path(Path(name)).name for name in names), MANIFEST):
                if (self.folder / name).exists():
                    os.replace(self.folder / name, self.out / name)
            flush(self.out)
            (self.out / REPLACING).unlink()
        except OSError as error:
            raise DataError(f"{self.out}: cannot be replaced ({error.strerror}). Repeat the command.") from error

    def remove(self) -> None:
        """Remove the hidden folder."""
        try:
            if self.folder.is_dir():
                self._journal.unlink(missing_ok=True)  # first, so that no run continues from the rest
                shutil.rmtree(self.folder)
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be removed ({error.strerror}).") from error

    def _append(self, record: dict[str, Any]) -> None:
        append_line(self._journal, json.dumps(record), sync=True)

    def _read(self) -> tuple[dict[str, Any], list[dict[str, Any]], bool]:
        """The options, a record for each shard, and whether the set is complete."""
        options, *lines = self._journal.read_bytes().split(b"\n")[:-1]  # the last line may be incomplete
        records: list[dict[str, Any]] = [json.loads(line) for line in lines]
        # A shard that was written again has two records.
        shards = {record["shard"]["name"]: record for record in records if "shard" in record}
        return json.loads(options), list(shards.values()), any("complete" in record for record in records)


def check_free(folder: Path, old: Iterable[Path]) -> None:
    """Raises: DataError if ``folder`` holds a set already."""
    existing = next((path for path in (*old, folder / MANIFEST) if path.exists()), None)
    if existing is not None:
        raise DataError(f"{existing}: exists already. Use --force, or another -o.")
