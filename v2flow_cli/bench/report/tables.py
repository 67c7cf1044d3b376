"""The report's tables: what was measured, what was published, every photo on its own; all sort on click."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from v2flow_cli.bench.published import PUBLISHED, SOURCE
from v2flow_cli.bench.results import Record, Table
from v2flow_cli.bench.run import Bench

MAX_IMAGE_ROWS = 600  # of the table of single photos; ``--images-csv`` has them all

Cell = tuple[str, str]  # (HTML, sort key; "" for what was not measured)
#: heading: (key of a record, decimals, whether it has an interval)
_COLUMNS: dict[str, tuple[str, int, bool]] = {
    "tokens": ("tokens_per_image", 0, False),
    "bytes": ("bytes_per_image", 0, False),
    "bits/pixel": ("bits_per_pixel", 4, False),
    "entropy bits/pixel": ("entropy_bits_per_pixel", 4, False),
    "PSNR dB": ("psnr_db", 2, True),
    "SSIM": ("ssim", 3, True),
    "MS-SSIM": ("ms_ssim", 3, True),
    "LPIPS": ("lpips", 3, True),
    "rFID": ("rfid", 2, False),
    "encode/s": ("encode_images_per_s", 2, False),
    "decode/s": ("decode_images_per_s", 2, False),
}


def measured_table(table: Table) -> str:
    """Every system over all photos, tokenizers marked; columns that no row fills are left out."""
    columns = {
        head: (key, digits, interval)
        for head, (key, digits, interval) in _COLUMNS.items()
        if key in ("lpips", "rfid") or any(row[key] is not None for row in table.rows)
    }
    rows = [
        [_text(row["system"]), *(_figure(row, key, digits, interval) for key, digits, interval in columns.values())]
        for row in table.rows
    ]
    protocol = table.protocol
    caption = (
        f"Measured here on {protocol['count']:,} photos at {table.size} × {table.size}: "
        f"mean ± 95% interval. Protocol {protocol['key']}."
    )
    return _table(caption, ("system",), tuple(columns), rows, [row["codebook"] is not None for row in table.rows])


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
    caption = f"Published figures, not measured here and on other pictures: {SOURCE}."
    heads = ("tokens", "codebook", "PSNR dB", "SSIM", "LPIPS")
    return _table(caption, ("published",), heads, rows) if rows else ""


def image_table(bench: Bench) -> str:
    """Every system on every photo, up to MAX_IMAGE_ROWS lines."""
    figures = bench.result.images
    rows = [
        [
            _text(f.image),
            _text(f.system),
            _cell(f.bytes, 0),
            _cell(f.psnr, 2),
            _cell(f.ssim, 3),
            _cell(f.ms_ssim, 3),
            _cell(f.lpips, 3),
        ]
        for f in figures[:MAX_IMAGE_ROWS]
    ]
    more = f", the first {len(rows):,} of {len(figures):,} lines" if len(rows) < len(figures) else ""
    heads = ("bytes", "PSNR dB", "SSIM", "MS-SSIM", "LPIPS")
    size = bench.result.protocol.image_size
    return _table(f"Every photo on its own at {size} pixels{more}.", ("photo", "system"), heads, rows, tall=True)


def show_number(value: float, digits: int) -> str:
    """``value`` with ``digits`` decimals, or the sign of infinity."""
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


def _figure(row: Record, key: str, digits: int, interval: bool) -> Cell:
    """A cell of a record; PSNR of equal pictures is infinite, which a record holds as null."""
    value = math.inf if key == "psnr_db" and row[key] is None else row[key]
    html, sort_key = _cell(value, digits)
    width = row[f"{key}_ci95"] if interval else None
    return (html if width is None else f"{html} <small>± {width:.{digits}f}</small>"), sort_key
