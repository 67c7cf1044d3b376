"""The report's tables: what was measured, what was published, every photo on its own; all sort on click."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from v2flow_cli.bench.metrics import Estimate
from v2flow_cli.bench.published import PUBLISHED, SOURCE
from v2flow_cli.bench.run import Bench

MAX_IMAGE_ROWS = 600  # of the table of single photos; ``--csv`` has them all

Cell = tuple[str, str]  # (HTML, sort key; "" for what was not measured)
_QUALITY = ("PSNR dB", "SSIM", "LPIPS")


def measured_table(bench: Bench) -> str:
    """Every system over all photos, the tokenizer's own rows marked."""
    protocol = bench.result.protocol
    rows = [
        [
            _text(row.system),
            _cell(row.bytes_per_image, 0),
            _cell(row.bits_per_pixel, 4),
            _interval(row.psnr, 2),
            _interval(row.ssim, 3),
            _interval(row.lpips, 3),
        ]
        for row in bench.result.rows
    ]
    caption = (
        f"Measured here on {protocol.count:,} photos at {protocol.image_size} × {protocol.image_size}: "
        f"mean ± 95% interval. Protocol {protocol.key}."
    )
    marked = [row.system in bench.main_systems for row in bench.result.rows]
    return _table(caption, ("system",), ("bytes", "bits/pixel", *_QUALITY), rows, marked)


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
    return _table(caption, ("published",), ("tokens", "codebook", *_QUALITY), rows) if rows else ""


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
            _cell(f.lpips, 3),
        ]
        for f in figures[:MAX_IMAGE_ROWS]
    ]
    more = f", the first {len(rows):,} of {len(figures):,} lines" if len(rows) < len(figures) else ""
    return _table(f"Every photo on its own{more}.", ("photo", "system"), ("bytes", *_QUALITY), rows, tall=True)


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


def _interval(value: Estimate | None, digits: int) -> Cell:
    if value is None:
        return "–", ""
    width = "" if math.isnan(value.ci95) else f" <small>± {value.ci95:.{digits}f}</small>"
    return show_number(value.mean, digits) + width, repr(value.mean)
