"""The beginning and the end of an ``encode``: the files of an earlier run, and the manifest of all files.

A token file is kept if a stopped run finished it and its input is unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from v2flow_cli.errors import DataError, TokenFileError
from v2flow_cli.runtime.processes import Processes, gather_texts
from v2flow_cli.store.failures import Failure, load_failures, save_failures
from v2flow_cli.store.files import check_absent, fingerprint, remove_partials
from v2flow_cli.store.not_taken import NotTaken
from v2flow_cli.store.token_manifest import TokenManifest, check_manifest_is_ours
from v2flow_cli.store.unfinished import Unfinished


@dataclass
class EncodeReport:
    """The files and images that an encoding wrote and kept, and its failures."""

    manifest: TokenManifest
    images: int = 0  # encoded by this call
    files: int = 0  # token files written by this call
    kept_files: int = 0  # finished by an earlier call
    tokens: int = 0  # written by this call
    later: int = 0  # tars left for another call by the time limit
    short: int = 0  # images of this call that miss the PSNR even with all tokens
    good: int = 0  # images in all files of this set, including earlier calls
    captioned: int = 0  # images of this call that have a caption
    failures: list[Failure] = field(default_factory=list)
    not_taken: NotTaken = field(default_factory=NotTaken)  # other files of the inputs


def begin_run(
    tokens: TokenManifest,
    inputs: Mapping[str, Path],
    out: Path,
    force: bool,
    ranks: Processes,
    not_taken: NotTaken | None,
    *,
    tars: bool,
) -> tuple[EncodeReport, set[str]]:
    """A report with the manifest in ``out``, and the keys of the token files that are kept.

    Args:   tokens, the run's manifest without files; inputs, the image or tar of each key; not_taken, other files of
            the inputs.
    """
    journal = Unfinished(out)
    existing = _manifest_of(out, tokens, force, inputs)
    check_manifest_is_ours(out)
    kept: set[str] = set()
    resumed = existing is not None and journal.exists and not force
    targets = {key: out / f"{key}.npy" for key in inputs}
    if existing is None:
        check_absent(targets.values(), force)
    elif not force:
        kept = _finished(existing, journal, inputs, targets, tars)
    if existing is not None:  # files that are written again are listed again when they are complete
        rewritten = inputs.keys() - kept
        files = {key: count for key, count in existing.files.items() if key not in rewritten}
        sources = {key: source for key, source in existing.sources.items() if key not in rewritten}
        existing = dataclasses.replace(existing, files=files, sources=sources)
    ranks.wait()  # until every rank has read the folder
    report = EncodeReport(tokens if existing is None else existing)
    if ranks.rank == 0:
        report.not_taken.merge(not_taken or NotTaken())
        report.failures += report.not_taken.lost
        journal.begin(inputs, resumed)
        report.manifest.save(out)  # from here on a repeated run recognises the files
        remove_partials(out)
    ranks.wait()
    return report, kept


def _finished(
    manifest: TokenManifest,
    journal: Unfinished,
    inputs: Mapping[str, Path],
    targets: Mapping[str, Path],
    tars: bool,
) -> set[str]:
    """The keys whose tokens a stopped run has finished; for ``tars`` also those of a complete run.

    Raises: DataError for tokens of other inputs, and for files that are not of such a run.
    """
    sources = manifest.sources | {key: finished.source for key, finished in journal.finished().items()}
    planned = journal.planned()
    kept, foreign = set(), []
    for key, target in targets.items():
        if not target.exists():
            continue
        if key in sources:
            if sources[key] != fingerprint(inputs[key]):
                raise DataError(
                    f"{target}: holds the tokens of another file of that name, or {inputs[key]} has changed since "
                    "then. Use another -o, or --force to encode everything again."
                )
            kept.add(key)
        elif key in manifest.files and tars:  # listed by a version without fingerprints
            kept.add(key)
        elif key in manifest.files or key not in planned:
            foreign.append(target)
    check_absent(foreign, False)
    return kept


def end_run(
    report: EncodeReport, inputs: Mapping[str, Path], out: Path, ranks: Processes, *, tars: bool
) -> EncodeReport:
    """Sum the ranks' reports; the first rank writes the manifest of all finished and earlier files."""
    journal = Unfinished(out)
    failures_file = journal.folder / f"failures-{ranks.rank}.jsonl"
    if ranks.rank:
        save_failures(failures_file, report.failures)
    counts = ("images", "files", "kept_files", "tokens", "short", "captioned", "later")
    for name, total in zip(counts, ranks.sum([getattr(report, name) for name in counts])):
        setattr(report, name, total)
    for text in gather_texts(report.not_taken.dump())[1:]:
        report.not_taken.merge(NotTaken.load(text))
    if ranks.rank == 0:
        for rank in range(1, ranks.count):
            report.failures += load_failures(failures_file.with_name(f"failures-{rank}.jsonl"))
        report.failures.sort(key=lambda failure: (failure.source, failure.key or ""))
        finished = {key: done for key, done in journal.finished().items() if (out / f"{key}.npy").exists()}
        files = report.manifest.files | {key: done.rows for key, done in finished.items()}
        report.good = sum(count for key, count in files.items() if key in inputs)
        sources = report.manifest.sources
        if tars:
            sources = sources | {key: done.source for key, done in finished.items()}
        report.manifest = dataclasses.replace(
            report.manifest, files=dict(sorted(files.items())), sources=dict(sorted(sources.items()))
        )
        report.manifest.save(out)
        journal.remove()
    ranks.wait()
    return report


def _manifest_of(out: Path, tokens: TokenManifest, force: bool, inputs: Mapping[str, Path]) -> TokenManifest | None:
    """The manifest in ``out`` if it is of the same tokens; None if there is none or it may be replaced."""
    existing = TokenManifest.load(out)
    if existing is None or existing.same_tokens(tokens):
        return existing
    others = existing.files.keys() - inputs.keys()
    if force and not others:
        return None
    rest = f" Of these, {len(others)} would not be replaced." if force else ""
    steps = existing.refine_steps
    refined = dataclasses.replace(tokens, refine_steps=steps, refined_by=existing.refined_by or tokens.refined_by)
    ways = ["another -o", *([f"--refine {steps}"] if refined.same_tokens(existing) else [])]
    raise TokenFileError(
        f"{out}: holds tokens of {existing.description}; these are of {tokens.description}.{rest} Use "
        f"{', '.join(ways)}{'' if force else ', or --force'}."
    )
