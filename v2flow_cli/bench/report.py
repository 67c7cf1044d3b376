"""One self-contained HTML page: photos against their reconstructions, drawn pictures, figures, protocol.

No network, no external file: pictures are data URIs. All text is escaped. Markup, style and script stand in
``report.html``; this file fills its five places.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path

import numpy as np

from v2flow_cli import __version__
from v2flow_cli.bench import pictures
from v2flow_cli.bench.evaluate import ImageFigures, KeptImage, Result, Row
from v2flow_cli.bench.run import Bench, as_record
from v2flow_cli.bench.tables import image_table, measured_table, published_table, show_number
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
    """What the page shows, with a heading and one sentence on top of it."""

    title: str
    lead: str
    bench: Bench
    colours: np.ndarray  # (K, 3) uint8, one colour a code
    command: str  # that made the page
    help_seconds: Mapping[str, float] = field(default_factory=dict)
    drawn: Sequence[DrawnPicture] = ()
    drawn_note: str = ""
    failed: Sequence[str] = ()

    @property
    def result(self) -> Result:
        return self.bench.result


def write_report(page: Page, path: Path) -> None:
    """Write ``render(page)`` to ``path``, or nothing.  Raises: DataError where it cannot be written."""
    write_bytes(path, render(page).encode())


def render(page: Page) -> str:
    """The page as one HTML text."""
    template = string.Template(files("v2flow_cli.bench").joinpath("report.html").read_text(encoding="utf-8"))
    body = [_failed(page), _photos(page), _drawn(page), _tables(page), _speed(page), _protocol(page)]
    return template.substitute(
        title=escape(page.title),
        lead=escape(page.lead),
        stats=_stats(page),
        body="\n".join(part for part in body if part),
        footer=f"Made by <code>{escape(page.command)}</code> with v2flow {__version__}.",
        version=__version__,
    )


def _stats(page: Page) -> str:
    result, row = page.result, _main_row(page)
    size, codebook = result.protocol.image_size, result.codebook
    raw = 3 * size * size
    items = [(f"{result.tokens_per_image:,}", f"tokens a photo of {size} × {size} pixels")]
    if row.bytes_per_image and row.bits_per_pixel:
        share = f"{row.bits_per_pixel:.3f} bits a pixel, 1/{raw / row.bytes_per_image:,.0f} of the raw pixels"
        items.append((f"{row.bytes_per_image:,.0f} bytes", share))
    items.append((f"{row.psnr.mean:.2f} dB", f"PSNR over {_count(row.psnr.count, 'photo')}, {row.system}"))
    items.append((f"{codebook.distinct:,} codes", f"of {codebook.codebook_size:,} in {codebook.tokens:,} tokens"))
    cells = "".join(f"<li><b>{escape(big)}</b><span>{escape(small)}</span></li>" for big, small in items)
    return f'<ul class="stats">{cells}</ul>'


def _main_row(page: Page) -> Row:
    return next(row for row in page.result.rows if row.system == page.bench.main_systems[0])


def _failed(page: Page) -> str:
    if not page.failed:
        return ""
    lines = "".join(f"<li>{escape(line)}</li>" for line in page.failed)
    return f'<section class="failed"><h3>{_count(len(page.failed), "file")} left out</h3><ul>{lines}</ul></section>'


def _photos(page: Page) -> str:
    kept, total = page.result.kept, page.result.protocol.count
    if not kept:
        return ""
    shown = f"The first {len(kept)} of {total:,} photos. " if len(kept) < total else ""
    hint = (
        "Drag across the large picture: the original is on the left, on the right whatever you choose beside "
        "it. The coloured strip is the photo as a language model reads it, one cell a token; near codes have "
        f"near colours. Error maps run from black (none) to pale yellow ({pictures.ERROR_FULL_SCALE} grey "
        "levels or more). Below each picture: PSNR and SSIM."
    )
    cards = "".join(_photo(page, image, i) for i, image in enumerate(kept))
    return f'<section><h2>Photos, and what comes back</h2><p class="hint">{shown}{hint}</p>{cards}</section>'


def _photo(page: Page, image: KeptImage, number: int) -> str:
    name = escape(image.name)
    rows, columns = pictures.token_grid_shape(len(image.token_ids))
    colours = page.colours[image.token_ids]
    variants = _variants(page, image, colours.reshape(rows, columns, 3))
    choices = "".join(_choice(number, i, name, *variant) for i, variant in enumerate(variants))
    ids = " ".join(str(int(i)) for i in image.token_ids)
    return f"""
<article class="photo">
<div class="top"><h3>{name}</h3>
<button class="enlarge" type="button" aria-pressed="false">Enlarge</button></div>
<div class="compare">
<img class="after" alt="">
<img class="before" src="{pictures.data_uri(image.reference)}" alt="{name}, the original">
<span class="cell" style="width:{100 / columns:.4f}%;height:{100 / rows:.4f}%"></span>
<span class="bar"></span>
<span class="tag left">original</span><span class="tag right"></span>
<input type="range" min="0" max="1000" value="500" aria-label="Share of the original shown, {name}">
</div>
<fieldset class="picks"><legend class="hide">Compare {name} with</legend>{choices}</fieldset>
<div class="words" data-ids="{ids}" data-rows="{rows}" data-columns="{columns}">
<div class="sentence" style="--n:{len(image.token_ids)}">
<img src="{pictures.data_uri(colours[None])}" alt="The tokens of {name} in reading order"><i></i>
<input type="range" min="0" max="{len(image.token_ids) - 1}" value="0" aria-label="Token of {name}">
</div>
<output>{len(image.token_ids):,} tokens in reading order. Slide along to see which code stands where.</output>
</div>
</article>"""


def _choice(number: int, i: int, name: str, label: str, note: str, pixels: np.ndarray, sharp: bool) -> str:
    """One picture that the photo can be compared with; the first one is chosen."""
    checked, kind = " checked" if i == 0 else "", ' class="pixel"' if sharp else ""
    label, note, uri = escape(label), escape(note), pictures.data_uri(pixels)
    return (
        f'<label class="pick"><input class="hide" type="radio" name="pick{number}" value="{label}"{checked}>'
        f'<img{kind} src="{uri}" alt="{label} of {name}"><b>{label}</b><span>{note}</span></label>'
    )


def _variants(page: Page, image: KeptImage, token_map: np.ndarray) -> Iterable[tuple[str, str, np.ndarray, bool]]:
    """(label, note, pixels, enlarge without smoothing) of everything the photo can be compared with."""
    mains = [s for s in page.bench.main_systems if s in image.pictures]
    others = [s for s in image.pictures if s not in mains]
    ceiling = [s for s in others if page.result.figures_of(image.name, s).bytes is None]
    codecs = [s for s in others if s not in ceiling]
    for system in [*mains, *ceiling]:
        yield system, _note(page.result.figures_of(image.name, system)), image.pictures[system], False
    for system in mains:
        label = "error" if len(mains) == 1 else f"error, {system.removeprefix('v2flow, ')}"
        yield label, "absolute difference", pictures.error_map(image.reference, image.pictures[system]), False
    yield "tokens", f"{token_map.shape[0]} × {token_map.shape[1]} grid", token_map, True
    for system in codecs:
        figures = page.result.figures_of(image.name, system)
        yield system, f"{figures.bytes} B · {show_number(figures.psnr, 2)} dB", image.pictures[system], False


def _note(figures: ImageFigures) -> str:
    return f"{show_number(figures.psnr, 2)} dB · {figures.ssim:.3f}"


def _drawn(page: Page) -> str:
    if not page.drawn:
        return ""
    parts = []
    for prompt in dict.fromkeys(picture.prompt for picture in page.drawn):
        cells = "".join(
            f'<figure><img src="{pictures.data_uri(p.pixels)}" '
            f'alt="{escape(prompt)}, temperature {p.temperature:g}">'
            f"<figcaption>temperature {p.temperature:g}, seed {p.seed}</figcaption></figure>"
            for p in page.drawn
            if p.prompt == prompt
        )
        parts.append(f'<p class="prompt">“{escape(prompt)}”</p><div class="drawn">{cells}</div>')
    note = f'<p class="hint">{escape(page.drawn_note)}</p>' if page.drawn_note else ""
    return f"<section><h2>Pictures from a sentence</h2>{note}{''.join(parts)}</section>"


def _tables(page: Page) -> str:
    size = page.result.protocol.image_size
    hint = (
        "Click a heading to sort. The codecs are given as many bytes as the tokens take and may choose any "
        "downscale and quality; their bytes are whole files. The autoencoder alone keeps all its latents, so "
        "it is the ceiling of every setting."
    )
    tables = measured_table(page.bench) + published_table(size) + image_table(page.bench)
    return f'<section><h2>Figures</h2><p class="hint">{hint}</p><div class="tables">{tables}</div></section>'


def _speed(page: Page) -> str:
    speed, codebook = page.bench.speed, page.result.codebook
    entropy = codebook.entropy_bits * page.result.tokens_per_image / page.result.protocol.image_size**2
    lines = [
        (
            "codebook usage",
            f"{codebook.usage:.1%} ({codebook.distinct:,} of {codebook.codebook_size:,} codes)",
        ),
        ("perplexity", f"{codebook.perplexity:,.0f}"),
        ("entropy", f"{codebook.entropy_bits:.2f} bits a token, {entropy:.4f} bits a pixel"),
    ]
    if speed:
        where = f"batches of {speed.batch_size}, {speed.dtype}, {speed.device}"
        where += f", {_count(speed.threads, 'thread')}" if speed.device == "cpu" else ""
        lines += [
            ("encode", f"{speed.encode_images_per_s:.2f} images/s ({where})"),
            (
                "decode",
                f"{speed.decode_images_per_s:.2f} images/s (median of {speed.repeats} after a warm-up)",
            ),
            ("peak memory", f"{speed.peak_memory_bytes / 2**30:.2f} GiB {speed.peak_memory_kind}"),
        ]
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
    protocol = page.result.protocol
    lines = [
        ("name", f"{protocol.name}, key {protocol.key}"),
        ("photos", f"{protocol.count}, digest {protocol.reference_digest}"),
        ("weights", page.bench.weights_digest),
        ("crop", protocol.crop.replace("image_size", f"{protocol.image_size} pixels")),
        ("rounding", protocol.rounding),
        ("PSNR", protocol.psnr),
        ("SSIM", protocol.ssim),
        ("LPIPS", protocol.lpips),
        ("interval", protocol.interval),
        ("seed", f"{protocol.seed}; each photo's own is drawn from it and the photo's name"),
        ("versions", ", ".join(f"{name} {number}" for name, number in protocol.versions.items())),
    ]
    lines += [("note", note) for note in page.bench.notes]
    text = escape(json.dumps(as_record(page.bench), indent=1, ensure_ascii=False))
    return (
        "<section><h2>Protocol</h2>"
        '<p class="hint">Figures may be compared only where the key of the protocol is the same.</p>'
        f"{_definitions(lines)}<details><summary>As JSON</summary><pre>{text}</pre></details></section>"
    )


def _definitions(lines: Sequence[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in lines) + "</dl>"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")
