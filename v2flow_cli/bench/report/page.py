"""One self-contained HTML page: photos against their reconstructions, drawn pictures, figures, protocol.

No network, no external file: pictures are data URIs. All text is escaped. Markup, style and script are in
``report.html``; this file fills its five fields.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path

import numpy as np

from v2flow_cli import __version__
from v2flow_cli.bench.report import illustrations
from v2flow_cli.bench.report.photo_html import photo_article
from v2flow_cli.bench.report.plots import plots
from v2flow_cli.bench.report.tables import image_table, measured_table, published_table
from v2flow_cli.bench.report.token_view import TokenView
from v2flow_cli.bench.results import Table, as_record
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
    template = string.Template(files("v2flow_cli.bench.report").joinpath("report.html").read_text(encoding="utf-8"))
    photos = [_photos(page, bench) for bench in page.benches]
    body = [_failed(page), *photos, _drawn(page), _tables(page), _speed(page), _protocol(page)]
    return template.substitute(
        title=escape(page.title),
        lead=escape(page.lead),
        stats=_stats(page),
        body="\n".join(part for part in body if part),
        footer=f"Made by <code>{escape(page.command)}</code> with v2flow {__version__}.",
        version=__version__,
    )


def _stats(page: Page) -> str:
    """The first tokenizer of the first table in four figures."""
    table = page.tables[0]
    row = next((row for row in table.rows if row["codebook"]), None)
    if row is None:
        return ""
    size, codebook = table.size, row["codebook"]
    raw, count = 3 * size * size, table.protocol["count"]
    items = [
        (f"{row['tokens_per_image']:,}", f"tokens a photo of {size} × {size} pixels"),
        (
            f"{row['bytes_per_image']:,.0f} bytes",
            f"{row['bits_per_pixel']:.3f} bits a pixel, 1/{raw / row['bytes_per_image']:,.0f} of the raw pixels; "
            f"{row['entropy_bits_per_pixel']:.3f} by the entropy of the codes",
        ),
        (
            "∞ dB" if row["psnr_db"] is None else f"{row['psnr_db']:.2f} dB",
            f"PSNR over {_count(count, 'photo')}, {row['system']}",
        ),
        (f"{codebook['distinct']:,} codes", f"of {codebook['codebook_size']:,} in {codebook['tokens']:,} tokens"),
    ]
    cells = "".join(f"<li><b>{escape(big)}</b><span>{escape(small)}</span></li>" for big, small in items)
    return f'<ul class="stats">{cells}</ul>'


def _failed(page: Page) -> str:
    if not page.failed:
        return ""
    lines = "".join(f"<li>{escape(line)}</li>" for line in page.failed)
    return f'<section class="failed"><h3>{_count(len(page.failed), "file")} left out</h3><ul>{lines}</ul></section>'


def _photos(page: Page, bench: Bench) -> str:
    images, protocol = bench.result.kept, bench.result.protocol
    if not images:
        return ""
    shown = f"The first {len(images)} of {protocol.count:,} photos. " if len(images) < protocol.count else ""
    hint = (
        "Drag across the large picture: the original is on the left, the picture chosen beside it on the right; "
        "2× and 4× enlarge it, and dragging moves it. The coloured strip is the photo as a language model "
        "reads it, one cell a token; near codes, or near words of the language model, have similar colours. Error "
        f"maps run from black (none) to pale yellow ({illustrations.ERROR_FULL_SCALE} grey levels or more). Below each "
        "picture: PSNR and SSIM."
    )
    cards = "".join(photo_article(bench, image, page.views) for image in images)
    at = f" at {protocol.image_size} pixels" if len(page.benches) > 1 else ""
    return f'<section><h2>Photos and their reconstructions{at}</h2><p class="hint">{shown}{hint}</p>{cards}</section>'


def _drawn(page: Page) -> str:
    if not page.drawn:
        return ""
    parts = []
    for prompt in dict.fromkeys(picture.prompt for picture in page.drawn):
        cells = "".join(
            f'<figure><img src="{illustrations.data_uri(p.pixels)}" '
            f'alt="{escape(prompt)}, temperature {p.temperature:g}">'
            f"<figcaption>temperature {p.temperature:g}, seed {p.seed}</figcaption></figure>"
            for p in page.drawn
            if p.prompt == prompt
        )
        parts.append(f'<p class="prompt">“{escape(prompt)}”</p><div class="drawn">{cells}</div>')
    note = f'<p class="hint">{escape(page.drawn_note)}</p>' if page.drawn_note else ""
    return f"<section><h2>Pictures from a sentence</h2>{note}{''.join(parts)}</section>"


def _tables(page: Page) -> str:
    hint = (
        "Click a heading to sort. The codecs may use as many bytes as the tokens take, with any "
        "downscale and quality; their bytes are whole files. The autoencoder alone keeps all its latents: "
        "it is the upper limit of every setting. Point at a mark of a plot to read its value."
    )
    tables = "".join(plots(table) + measured_table(table) + published_table(table.size) for table in page.tables)
    tables += "".join(image_table(bench) for bench in page.benches)
    return f'<section><h2>Figures</h2><p class="hint">{hint}</p><div class="tables">{tables}</div></section>'


def _speed(page: Page) -> str:
    lines = []
    for row in (row for table in page.tables for row in table.rows if row["codebook"]):
        codebook, speed = row["codebook"], row["speed"]
        text = (
            f"{codebook['usage']:.1%} of the codes used ({codebook['distinct']:,} of {codebook['codebook_size']:,}); "
            f"perplexity {codebook['perplexity']:,.0f}; {codebook['entropy_bits']:.2f} bits a token by the entropy of "
            f"the codes, {codebook['adaptive_bits']:.2f} by an adaptive code"
        )
        if speed:
            where = f"batches of {speed['batch_size']}, {speed['dtype']}, {speed['device']}"
            where += f", {_count(speed['threads'], 'thread')}" if speed["device"] == "cpu" else ""
            text += (
                f"; encodes {speed['encode_images_per_s']:.2f} and decodes {speed['decode_images_per_s']:.2f} images/s "
                f"({where}; median of {speed['repeats']} after a warm-up); peak memory "
                f"{speed['peak_memory_bytes'] / 2**30:.2f} GiB {speed['peak_memory_kind']}"
            )
        at = f" at {row['image_size_px']} px" if len(page.tables) > 1 else ""
        lines.append((row["system"] + at, text))
    if page.help_seconds:
        slowest = max(page.help_seconds, key=lambda command: page.help_seconds[command])
        lines.append(
            (
                "--help",
                f"{page.help_seconds['']:.2f} s; the slowest command, {slowest or 'v2flow'}: "
                f"{page.help_seconds[slowest]:.2f} s",
            )
        )
    return f"<section><h2>Codes and speed</h2>{_definitions(lines)}</section>"


def _protocol(page: Page) -> str:
    parts = []
    for table in page.tables:
        protocol = dict(table.protocol)
        name, key, versions = protocol.pop("name"), protocol.pop("key"), protocol.pop("versions")
        size, seed = protocol.pop("image_size"), protocol.pop("seed")
        lines = [("name", f"{name}, key {key}"), ("image size", f"{size} pixels")]
        lines += [(term.replace("_", " "), str(text or "not measured")) for term, text in protocol.items()]
        lines.append(("seed", f"{seed}; each photo's own seed depends on it and on the photo's name"))
        lines.append(("versions", ", ".join(f"{library} {number}" for library, number in versions.items())))
        digests = {row["family"]: row["weights_digest"] for row in table.rows if row["weights_digest"]}
        lines += [(f"weights of {family}", digest) for family, digest in digests.items()]
        parts.append(_definitions(lines))
    notes = _definitions([("note", note) for note in dict.fromkeys(page.notes)])
    text = escape(json.dumps(as_record(page.tables, page.notes), indent=1, ensure_ascii=False))
    return (
        "<section><h2>Protocol</h2>"
        '<p class="hint">Figures may be compared only where the key of the protocol is the same.</p>'
        f"{''.join(parts)}{notes}<details><summary>As JSON</summary><pre>{text}</pre></details></section>"
    )


def _definitions(lines: Sequence[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in lines) + "</dl>"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")
