"""``v2flow shard``: a folder of images to WebDataset tars."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from v2flow_cli.cli import options
from v2flow_cli.cli.console import ERROR_BUDGET, fail, failures_json, log, log_left_out, progress, result, result_json

Check = Literal["quick", "full"]  # sizes and counts; every byte


def shard(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Folder of images, or of tars, searched recursively; or one tar.")
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for the tars and their manifest.", show_default=False)
    ] = None,
    captions: Annotated[
        str,
        typer.Option(
            metavar="sidecars|classes|FILE",
            help="sidecars: KEY.txt, a caption a line. classes: 'a photo of FOLDER'. FILE: .csv, .tsv or .jsonl "
            "with columns file and caption; only the images that it lists are packed. Tars have their own.",
        ),
    ] = "sidecars",
    class_names: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="For classes: names of the folders, lines such as 'n02119022 red fox'."),
    ] = None,
    shard_mb: Annotated[float, typer.Option(min=0.001, help="Size of a tar in MB (10^6 bytes), at most.")] = 256.0,
    res: Annotated[
        int | None,
        typer.Option(
            min=1, help="Reduce the shorter side to at most this many pixels (JPEG). Default: unchanged bytes."
        ),
    ] = None,
    prefix: Annotated[str, typer.Option(help="Tars are named PREFIX-000000.tar and so on.")] = "shard",
    workers: Annotated[int, typer.Option(min=1, help="Threads that read and check images.")] = 2,
    error_budget: options.ErrorBudget = ERROR_BUDGET,
    check: Annotated[
        Check | None, typer.Option(help="Write nothing: compare the tars in SRC with their manifest.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the shards in the output folder.")] = False,
    json_: options.Json = False,
) -> None:
    """Pack a folder of images and captions into WebDataset tars with a manifest of counts and hashes.

    Examples:

        v2flow shard imgs/ -o shards/

        v2flow shard imgs/ -o class-shards/ --captions classes --res 512

        v2flow shard imgs/ -o small-shards/ --shard-mb 16 --prefix photos

        v2flow shard shards/ --check full
    """
    if not prefix or not prefix.isprintable() or any(c in prefix for c in "/\\.*?[]"):
        raise typer.BadParameter("expected a plain name without dots or slashes", param_hint="--prefix")

    if check is not None:
        return _check(source, check, json_)
    if out is None:
        raise typer.BadParameter("expected a folder for the tars", param_hint="-o")

    from v2flow_cli.errors import DataError
    from v2flow_cli.jobs import shard_sources
    from v2flow_cli.jobs.shard import write_shards
    from v2flow_cli.jobs.shard_staging import ShardReport
    from v2flow_cli.store.failures import over_budget
    from v2flow_cli.store.find import find_inputs
    from v2flow_cli.store.not_taken import NotTaken
    from v2flow_cli.store.paths import check_apart, output_folder, user_path
    from v2flow_cli.store.tables import TABLE_SUFFIXES, read_class_names

    out = output_folder(out)
    check_apart(out, [source])
    report, not_taken = ShardReport(), NotTaken()
    files = find_inputs([source], exclude=out)
    files.check_one_kind(source)
    if files.images and not user_path(source).is_dir():
        raise DataError(f"{source}: not a folder or a tar. Name a folder of images, or of tars.")
    if files.tars and captions != "sidecars":
        raise typer.BadParameter(
            f"{captions}: {source} holds tars, which have their own captions", param_hint="--captions"
        )
    if class_names is not None and captions != "classes":
        raise typer.BadParameter("needs --captions classes", param_hint="--class-names")
    folder = user_path(source)
    search: dict[str, Any] = {"not_taken": not_taken, "exclude": out}
    if files.tars:
        sources = shard_sources.sources_from_tars(source, report.failures, **search)
    elif captions == "sidecars":
        sources = shard_sources.sources_from_sidecars(folder, **search)
    elif captions == "classes":
        names = read_class_names(user_path(class_names)) if class_names else None
        sources = shard_sources.sources_from_classes(folder, names, **search)
    elif Path(captions).suffix.lower() in TABLE_SUFFIXES:
        sources = shard_sources.sources_from_table(folder, user_path(captions), report.failures, **search)
    else:
        raise typer.BadParameter(
            f"{captions}: expected sidecars, classes, or a .csv, .tsv or .jsonl file", param_hint="--captions"
        )
    del files  # a long list for a large set, which the sources repeat
    with progress("shard", None) as tick:
        write_shards(
            sources,
            out,
            prefix=prefix,
            shard_bytes=int(shard_mb * 1e6),
            short_side=res,
            workers=workers,
            force=force,
            report=report,
            tick=tick,
        )
    report.failures += not_taken.lost
    if json_:
        result_json(
            {
                "output": str(out),
                "shards": len(report.shards),
                "kept_shards": report.kept_shards,
                "samples": report.samples,
                "captions": report.captions,
                "bytes": report.bytes,
                "without_caption": report.samples - report.captioned,
                "failed": failures_json(report.failures),
                "not_taken": not_taken.as_json(),
            }
        )
    else:
        kept = f" ({report.kept_shards} finished earlier)" if report.kept_shards else ""
        result(
            f"{out}: {report.samples} images, {report.captions} captions in {len(report.shards)} shards{kept}, "
            f"{report.bytes:,} bytes"
        )
    log_left_out(report.failures, not_taken)
    if 0 < report.captioned < report.samples:
        log(f"{report.samples - report.captioned:,} of {report.samples:,} images have no caption")
    if not report.samples and not report.failures:
        fail(f"{source}: no image in it; nothing was written to {out}.")
    if not report.samples or over_budget(report.failures, report.samples, error_budget):
        where = f"{report.samples} are in {out}" if report.samples else f"nothing was written to {out}"
        fail(f"{len(report.failures)} images were left out; {where}.")


def _check(source: str, check: Check, json_: bool) -> None:
    """Check every shard in ``source`` against its manifest; bad samples are listed, with exit code 1."""
    from v2flow_cli.errors import DataError
    from v2flow_cli.store.failures import Failure
    from v2flow_cli.store.find import find_tars
    from v2flow_cli.store.shards import index_shard

    shards, samples, failures = find_tars([source]), 0, []
    with progress("check", len(shards)) as tick:
        for path in (shard.path for shard in shards):
            try:
                index = index_shard(path, check)
                samples += len(index.samples)
                failures += index.failures
            except DataError as error:
                failures.append(Failure.of(error, path, samples=None))
            tick()
    if json_:
        result_json({"shards": len(shards), "samples": samples, "failed": failures_json(failures)})
    else:
        result(f"{source}: {samples} intact samples in {len(shards)} shards, {len(failures)} problems")
    for failure in failures:
        log(f"{failure.name}: {failure.reason}")
    if failures:
        fail(f"{source}: differs from its manifest; the {check} check found {len(failures)} problems.")
