"""``v2flow bench --join``: one table of saved results, or a refusal where their protocols differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from v2flow_cli.cli.bench_tables import print_tables
from v2flow_cli.cli.console import log, result, result_json


def join_results(files: Sequence[Path], *, csv: Path | None, report: Path | None, json_: bool) -> None:
    """Print, and where asked write, the tables of ``files``."""
    from v2flow_cli.bench.report.page import Page, write_report
    from v2flow_cli.bench.results import as_csv, as_record, join
    from v2flow_cli.store.files import write_bytes

    found, notes = join(files)
    if csv:
        write_bytes(csv, as_csv(found).encode())
    if report:
        page = Page(
            title="What tokens keep of a photo",
            lead=f"Results of {len(files)} runs, measured on the same photos in the same way.",
            tables=found,
            command="v2flow bench --join",
            notes=notes,
        )
        write_report(page, report)
    if json_:
        result_json(as_record(found, notes))
    else:
        print_tables(found)
        for file in filter(None, (report, csv)):
            result(f"wrote {file}")
    for note in notes:
        log(f"note: {note}")
