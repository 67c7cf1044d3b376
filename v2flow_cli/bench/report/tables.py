"""The report's tables: measured and published figures, and each photo; all sort on click."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from v2flow_cli.bench.metrics import METRICS, Metric
from v2flow_cli.bench.published import PUBLISHED, SOURCE
from v2flow_cli.bench.results import Record, Table, columns, shown
from v2flow_cli.bench.run import Bench

MAX_IMAGE_ROWS = 600  # of the table of single photos; ``--images-csv`` writes all

Cell = tuple[str, str]  # (HTML, sort key; "" if not measured)


def measured_table(table: Table) -> str:
    """Every system over all photos, tokenizers marked; empty columns are left out."""
    metrics = columns(table)
    rows = [[_text(row["system"]), *(_figure(row, metric) for metric in metrics)] for row in table.rows]
    protocol = table.protocol
    caption = (
        f"Measured here on {protocol['count']:,} photos at {table.size} × {table.size}: "
        f"mean ± 95% interval. Protocol {protocol['key']}."
    )
    heads = [metric.heading for metric in metrics]
    return _table(caption, ("system",), heads, rows, [row["codebook"] is not None for row in table.rows])


def published_table(image_size: int) -> str:
    """The paper's Table 1 at ``image_size`` pixels; nothing at other sizes."""
    rows = [
        [
            _text(row.system),
            _cell(row.tokens, 0),
            _cell(row.codebook_size, 0),
            _cell(row.psnr, 2),
            _cell(row.ssim, 2),
            _cell(row.lpips, 2),
        ]
        for row in PUBLISHED.get(image_size, ())
    ]
    caption = f"Published figures, measured by others on other pictures: {SOURCE}."
    heads = ("tokens", "codebook", "PSNR dB", "SSIM", "LPIPS")
    return _table(caption, ("published",), heads, rows) if rows else ""


def image_table(bench: Bench) -> str:
    """Every system on every photo, up to MAX_IMAGE_ROWS lines."""
    figures = bench.result.images
    metrics = [metric for metric in METRICS if metric.of_images]
    rows = [
        [
            _text(f.image),
            _text(f.system),
            _cell(f.bytes, 0),
            *(_cell(f.values[metric.key], metric.decimals) for metric in metrics),
        ]
        for f in figures[:MAX_IMAGE_ROWS]
    ]
    more = f", the first {len(rows):,} of {len(figures):,} lines" if len(rows) < len(figures) else ""
    heads = ("bytes", *(metric.heading for metric in metrics))
    size = bench.result.protocol.image_size
    return _table(f"Each photo at {size} pixels{more}.", ("photo", "system"), heads, rows, tall=True)


def show_number(value: float, digits: int) -> str:
    """``value`` with ``digits`` decimals, or ∞."""
    return "∞" if math.isinf(value) else f"{value:,.{digits}f}"


def _table(
    caption: str,
    texts: Sequence[str],
    numbers: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    marked: Sequence[bool] = (),
    tall: bool = False,
) -> str:
    """A table of text columns, then number columns; a first click sorts text up, numbers down."""
    kinds = ["text"] * len(texts) + ["number"] * len(numbers)
    head = "".join(
        f'<th scope="col" class="{kind}"><button type="button">{escape(label)}</button></th>'
        for label, kind in zip((*texts, *numbers), kinds)
    )
    lines = []
    for i, row in enumerate(rows):
        cells = "".join(
            f'<td class="{kind}" data-value="{escape(key)}">{html}</td>' for (html, key), kind in zip(row, kinds)
        )
        lines.append(f"<tr{' class=ours' if i < len(marked) and marked[i] else ''}>{cells}</tr>")
    kind, caption = "scroll tall" if tall else "scroll", escape(caption)
    return (
        f'<div class="{kind}" tabindex="0" role="region" aria-label="{caption}">'
        f'<table class="sorts"><caption><span>{caption}</span></caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _text(text: str) -> Cell:
    return escape(text), text


def _cell(value: float | None, digits: int) -> Cell:
    return ("–", "") if value is None else (show_number(value, digits), repr(float(value)))


def _figure(row: Record, metric: Metric) -> Cell:
    value = row.get(metric.key)
    text, _, width = shown(metric, row).partition(" ± ")
    if value is None:
        return ("∞", repr(math.inf)) if metric.infinite else ("–", "")
    return (f"{text} <small>± {width}</small>" if width else text), repr(float(value))
