"""``v2flow bench join``: saved results of the same protocol in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from v2flow_cli.cli import options
from v2flow_cli.cli.console import log, result, result_json


def join(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE.json...", help="Results that `v2flow bench --json` printed.")
    ],
    csv: options.Csv = None,
    report: options.Report = None,
    json_: options.Json = False,
) -> None:
    """Put saved results of the same protocol into one table; measure nothing.

    Examples:

        v2flow bench join first.json second.json --report both.html
    """
    from v2flow_cli.bench.report.page import Page, write_report
    from v2flow_cli.bench.results import as_csv, as_record
    from v2flow_cli.bench.results import join as join_results
    from v2flow_cli.cli.bench_terminal import print_tables

    tables, notes = join_results(files)
    options.write_to(csv, as_csv(tables).encode())
    if report:
        page = Page(
            title="Reconstruction of photos from tokens",
            lead=f"Results of {len(files)} runs, measured on the same photos in the same way.",
            tables=tables,
            command="v2flow bench join",
            notes=notes,
        )
        write_report(page, report)
    if json_:
        result_json(as_record(tables, notes))
    else:
        print_tables(tables)
        for file in filter(None, (report, csv)):
            result(f"wrote {file}")
    for note in notes:
        log(f"note: {note}")
