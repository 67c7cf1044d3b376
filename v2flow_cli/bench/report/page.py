"""One self-contained HTML page: photos against their reconstructions, drawn pictures, figures, protocol.

No network, no external file: pictures are data URIs. ``report.html`` and ``parts.html`` have markup, style and script.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from v2flow_cli.bench.report.illustrations import ERROR_FULL_SCALE
from v2flow_cli.bench.report.photo_view import photo_view
from v2flow_cli.bench.report.plots import plots
from v2flow_cli.bench.report.tables import image_table, measured_table, published_table
from v2flow_cli.bench.report.templates import fill
from v2flow_cli.bench.report.token_view import TokenView
from v2flow_cli.bench.results import Table, as_record, codes_text, help_text, speed_text
from v2flow_cli.bench.run import Bench
from v2flow_cli.store.files import write_bytes


@dataclass(frozen=True)
class DrawnPicture:
    """A picture that the LLM drew; pixels (S, S, 3) uint8."""

    prompt: str
    temperature: float
    seed: int
    pixels: np.ndarray


@dataclass(frozen=True)
class Page:
    """The content of the page, its heading and first sentence; without benches it shows results only."""

    title: str
    lead: str
    tables: Sequence[Table]
    command: str  # command line that made the page
    benches: Sequence[Bench] = ()
    views: Mapping[str, TokenView] = field(default_factory=dict)  # by family
    help_seconds: Mapping[str, float] = field(default_factory=dict)
    drawn: Sequence[DrawnPicture] = ()
    drawn_note: str = ""
    notes: Sequence[str] = ()
    failed: Sequence[str] = ()


def write_report(page: Page, path: Path) -> None:
    """Write ``render(page)`` to ``path``, or nothing.  Raises: DataError if the file cannot be written."""
    write_bytes(path, render(page).encode())


def render(page: Page) -> str:
    """The page as one HTML text."""
    tables = [(plots(table), [measured_table(table), *published_table(table.size)]) for table in page.tables]
    return fill(
        "report.html",
        page=page,
        stats=_stats(page.tables[0]),
        photos=[[photo_view(bench, image, page.views) for image in bench.result.kept] for bench in page.benches],
        error_full_scale=ERROR_FULL_SCALE,
        drawn={p.prompt: [q for q in page.drawn if q.prompt == p.prompt] for p in page.drawn},
        tables=tables,
        image_tables=[image_table(bench) for bench in page.benches],
        speed=_speed(page),
        protocols=[_protocol(table) for table in page.tables],
        notes=[("note", note) for note in dict.fromkeys(page.notes)],
        record=json.dumps(as_record(page.tables, page.notes), indent=1, ensure_ascii=False),
    )


def _stats(table: Table) -> list[tuple[str, str]]:
    """The first tokenizer of a table in four figures, each with its explanation; none without a tokenizer."""
    row = next((row for row in table.rows if row["codebook"]), None)
    if row is None:
        return []
    size, codebook, count = table.size, row["codebook"], table.protocol["count"]
    return [
        (f"{row['tokens_per_image']:,}", f"tokens a photo of {size} × {size} pixels"),
        (
            f"{row['bytes_per_image']:,.0f} bytes",
            f"{row['bits_per_pixel']:.3f} bits a pixel, 1/{3 * size * size / row['bytes_per_image']:,.0f} of the raw "
            f"pixels; {row['entropy_bits_per_pixel']:.3f} by the entropy of the codes",
        ),
        (
            "∞ dB" if row["psnr_db"] is None else f"{row['psnr_db']:.2f} dB",
            f"PSNR over {count:,} photo{'' if count == 1 else 's'}, {row['system']}",
        ),
        (f"{codebook['distinct']:,} codes", f"of {codebook['codebook_size']:,} in {codebook['tokens']:,} tokens"),
    ]


def _speed(page: Page) -> list[tuple[str, str]]:
    lines = []
    for row in (row for table in page.tables for row in table.rows if row["codebook"]):
        at = f" at {row['image_size_px']} px" if len(page.tables) > 1 else ""
        text = "; ".join([codes_text(row), *([speed_text(row)] if row["speed"] else [])])
        lines.append((row["system"] + at, text))
    return lines + ([("--help", help_text(page.help_seconds))] if page.help_seconds else [])


def _protocol(table: Table) -> list[tuple[str, str]]:
    protocol = dict(table.protocol)
    name, key, versions = protocol.pop("name"), protocol.pop("key"), protocol.pop("versions")
    size, seed = protocol.pop("image_size"), protocol.pop("seed")
    lines = [("name", f"{name}, key {key}"), ("image size", f"{size} pixels")]
    lines += [(term.replace("_", " "), str(text or "not measured")) for term, text in protocol.items()]
    lines.append(("seed", f"{seed}; each photo's own seed depends on it and on the photo's name"))
    lines.append(("versions", ", ".join(f"{library} {number}" for library, number in versions.items())))
    digests = {row["family"]: row["weights_digest"] for row in table.rows if row["weights_digest"]}
    return lines + [(f"weights of {family}", digest) for family, digest in digests.items()]
