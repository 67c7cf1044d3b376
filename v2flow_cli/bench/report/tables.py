"""The report's tables: measured and published figures, and each photo; all sort on click."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from v2flow_cli.bench.metrics import METRICS, Metric
from v2flow_cli.bench.published import PUBLISHED, SOURCE
from v2flow_cli.bench.results import Record, Table, columns, shown
from v2flow_cli.bench.run import Bench

MAX_IMAGE_ROWS = 600  # of the table of single photos; ``--images-csv`` writes all

Cell = tuple[str, str]  # (text, sort key; "" if not measured)


@dataclass(frozen=True)
class SortedTable:
    """Columns of text, then of numbers; a first click sorts text up, numbers down.  marked: rows of tokenizers."""

    caption: str
    texts: Sequence[str]
    numbers: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    marked: Sequence[bool] = ()
    tall: bool = False

    @property
    def heads(self) -> list[tuple[str, str]]:
        """(heading, kind) of each column."""
        return [*((text, "text") for text in self.texts), *((number, "number") for number in self.numbers)]


def measured_table(table: Table) -> SortedTable:
    """Every system over all photos, tokenizers marked; empty columns are left out."""
    metrics, protocol = columns(table), table.protocol
    rows = [[_text(row["system"]), *(_figure(row, metric) for metric in metrics)] for row in table.rows]
    caption = (
        f"Measured here on {protocol['count']:,} photos at {table.size} × {table.size}: "
        f"mean ± 95% interval. Protocol {protocol['key']}."
    )
    heads = [metric.heading for metric in metrics]
    return SortedTable(caption, ("system",), heads, rows, [row["codebook"] is not None for row in table.rows])


def published_table(image_size: int) -> list[SortedTable]:
    """The paper's Table 1 at ``image_size`` pixels; none at other sizes."""
    rows = []
    for row in PUBLISHED.get(image_size, ()):
        figures = [_cell(row.psnr, 2), _cell(row.ssim, 2), _cell(row.lpips, 2)]
        rows.append([_text(row.system), _cell(row.tokens, 0), _cell(row.codebook_size, 0), *figures])
    caption = f"Published figures, measured by others on other pictures: {SOURCE}."
    heads = ("tokens", "codebook", "PSNR dB", "SSIM", "LPIPS")
    return [SortedTable(caption, ("published",), heads, rows)] if rows else []


def image_table(bench: Bench) -> SortedTable:
    """Every system on every photo, up to MAX_IMAGE_ROWS lines."""
    figures = bench.result.images
    metrics = [metric for metric in METRICS if metric.of_images]
    rows = []
    for f in figures[:MAX_IMAGE_ROWS]:
        cells = [_cell(f.values[metric.key], metric.decimals) for metric in metrics]
        rows.append([_text(f.image), _text(f.system), _cell(f.bytes, 0), *cells])
    more = f", the first {len(rows):,} of {len(figures):,} lines" if len(rows) < len(figures) else ""
    heads = ("bytes", *(metric.heading for metric in metrics))
    size = bench.result.protocol.image_size
    return SortedTable(f"Each photo at {size} pixels{more}.", ("photo", "system"), heads, rows, tall=True)


def show_number(value: float, digits: int) -> str:
    """``value`` with ``digits`` decimals, or ∞."""
    return "∞" if math.isinf(value) else f"{value:,.{digits}f}"


def _text(text: str) -> Cell:
    return text, text


def _cell(value: float | None, digits: int) -> Cell:
    return ("–", "") if value is None else (show_number(value, digits), repr(float(value)))


def _figure(row: Record, metric: Metric) -> Cell:
    value = row.get(metric.key)
    text, _, width = shown(metric, row).partition(" ± ")
    if value is None:
        return ("∞", repr(math.inf)) if metric.infinite else ("–", "")
    return (Markup("{} <small>± {}</small>").format(text, width) if width else text), repr(float(value))
