"""``v2flow shard``: a folder of images to WebDataset tars."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from v2flow_cli.cli.console import fail, log, progress, result, result_json


def shard(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of images, searched recursively.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder for the tars and their manifest.", show_default=False)
    ],
    captions: Annotated[
        str,
        typer.Option(
            metavar="sidecars|classes|FILE",
            help="sidecars: KEY.txt, a caption a line. classes: 'a photo of FOLDER'. FILE: .csv or .jsonl "
            "with columns file and caption; only the images it lists are taken.",
        ),
    ] = "sidecars",
    shard_mb: Annotated[float, typer.Option(min=0.001, help="Size of a tar in MB (10^6 bytes), at most.")] = 256.0,
    res: Annotated[
        int | None,
        typer.Option(min=1, help="Make the shorter side at most this many pixels (JPEG). Default: bytes as they are."),
    ] = None,
    prefix: Annotated[str, typer.Option(help="Tars are named PREFIX-000000.tar and so on.")] = "shard",
    workers: Annotated[int, typer.Option(min=1, help="Threads that read and check images.")] = 2,
    force: Annotated[bool, typer.Option("--force", help="Replace the shards in the output folder.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Pack a folder of images and captions into WebDataset tars with a manifest of counts and hashes.

    Examples:

        v2flow shard imgs/ -o shards/

        v2flow shard imgs/ -o class-shards/ --captions classes --res 512

        v2flow shard imgs/ -o small-shards/ --shard-mb 16 --prefix photos
    """
    if not prefix or any(c in prefix for c in "/\\.*?[]"):
        raise typer.BadParameter("expected a plain name without dots or slashes", param_hint="--prefix")

    from v2flow_cli.errors import DataError
    from v2flow_cli.store import write_shards as writer

    if not source.is_dir():
        raise DataError(f"{source}: not a folder. Give a folder of images.")
    report = writer.ShardReport()
    if captions == "sidecars":
        sources = writer.sources_from_sidecars(source)
    elif captions == "classes":
        sources = writer.sources_from_classes(source)
    elif Path(captions).suffix.lower() in (".csv", ".jsonl"):
        sources = writer.sources_from_table(source, Path(captions), report.failures)
    else:
        raise typer.BadParameter(
            f"{captions}: expected sidecars, classes, or a .csv or .jsonl file", param_hint="--captions"
        )
    with progress("shard", None) as tick:
        writer.write_shards(
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
    if json_:
        result_json(
            {
                "output": str(out),
                "shards": len(report.shards),
                "samples": report.samples,
                "captions": report.captions,
                "bytes": report.bytes,
                "failed": [{"source": name, "reason": reason} for name, reason in report.failures],
            }
        )
    else:
        result(
            f"{out}: {report.samples} images, {report.captions} captions in {len(report.shards)} shards, "
            f"{report.bytes:,} bytes"
        )
    for name, reason in report.failures:
        log(f"left out: {name}: {reason}")
    if report.failures or not report.samples:
        fail(f"{len(report.failures)} images were left out; {report.samples} are in {out}.")
