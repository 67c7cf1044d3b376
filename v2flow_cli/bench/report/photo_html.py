"""One photo of the report: the original, every picture it can be compared with, and its tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape

import numpy as np

from v2flow_cli.bench.evaluate import ImageFigures, KeptImage, Row
from v2flow_cli.bench.report.illustrations import data_uri, error_map, token_grid_shape
from v2flow_cli.bench.report.tables import show_number
from v2flow_cli.bench.report.token_view import TokenView
from v2flow_cli.bench.run import Bench

MAX_ERROR_MAPS = 3  # with more tokenizers than this, only the first has an error map

Variant = tuple[str, str, np.ndarray, bool]  # label, note, pixels, enlarge without smoothing


def photo_article(bench: Bench, image: KeptImage, views: Mapping[str, TokenView]) -> str:
    """The HTML of one photo; ``views`` by family colour the tokens of the first tokenizer that has one."""
    name = escape(image.name)
    group = escape(f"pick {bench.result.protocol.image_size} {image.name}")
    reader = next((row for row in bench.result.coders if row.family in views), None)
    variants = [*_pictures(bench, image), *(_maps(image, reader, views[reader.family]) if reader else ())]
    choices = "".join(_choice(group, i, name, *variant) for i, variant in enumerate(variants))
    words = _words(name, group, image.token_ids[reader.system], views[reader.family]) if reader else ""
    return f"""
<article class="photo">
<div class="top"><h3>{name}</h3>
<div class="zoom" role="group" aria-label="Zoom of {name}">
<button type="button" value="1" aria-pressed="true">1×</button>
<button type="button" value="2" aria-pressed="false">2×</button>
<button type="button" value="4" aria-pressed="false">4×</button>
<button class="enlarge" type="button" aria-pressed="false">Enlarge</button></div></div>
<div class="view" tabindex="0" role="region" aria-label="{name}, original and reconstruction"><div class="compare">
<img class="after" alt="">
<img class="before" src="{data_uri(image.reference)}" alt="{name}, the original">
<span class="cell"></span>
<span class="bar"></span>
<span class="tag left">original</span><span class="tag right"></span>
<input type="range" min="0" max="1000" value="500" aria-label="Share of the original shown, {name}">
</div></div>
{_lengths(bench, name)}
<fieldset class="picks"><legend class="hide">Compare {name} with</legend>{choices}</fieldset>
{words}
</article>"""


def _lengths(bench: Bench, name: str) -> str:
    """A slider over the lengths of each tokenizer that was measured at several: the picture grows with its tokens."""
    families: dict[str, dict[float, str]] = {}
    for row in bench.result.coders:
        if row.tokens_per_image:
            families.setdefault(row.family, {})[row.tokens_per_image] = row.system
    sliders = []
    for family, systems in families.items():
        lengths = sorted(systems)
        if len(lengths) < 2:
            continue
        steps = escape(json.dumps([[f"{length:,.0f}", systems[length]] for length in lengths]))
        label = escape(f"Tokens of {name}, {family}")
        sliders.append(
            f'<label class="lengths"><span>{escape(family)}: <b>1 to {lengths[-1]:,.0f}</b> tokens</span>'
            f'<input type="range" min="0" max="{len(lengths) - 1}" value="0" data-steps="{steps}" aria-label="{label}">'
            "</label>"
        )
    return "".join(sliders)


def _choice(group: str, i: int, name: str, label: str, note: str, pixels: np.ndarray, sharp: bool) -> str:
    """One picture that the photo can be compared with; the first one is chosen."""
    checked, kind = " checked" if i == 0 else "", ' class="pixel"' if sharp else ""
    label, note, uri = escape(label), escape(note), data_uri(pixels)
    return (
        f'<label class="pick"><input class="hide" type="radio" name="{group}" value="{label}"{checked}>'
        f'<img{kind} src="{uri}" alt="{label} of {name}"><b>{label}</b><span>{note}</span></label>'
    )


def _pictures(bench: Bench, image: KeptImage) -> Iterable[Variant]:
    """Reconstructions, the autoencoder's, error maps, then the codecs'."""
    rows, coders = bench.result.rows, bench.result.coders
    for row in [*coders, *(row for row in rows if row.kind == "autoencoder")]:
        yield row.system, _note(bench.result.figures_of(image.name, row.system)), image.pictures[row.system], False
    mapped = coders if len(coders) <= MAX_ERROR_MAPS else coders[:1]
    for row in mapped:
        label = "error" if len(coders) == 1 else f"error, {row.system}"
        yield label, "absolute difference", error_map(image.reference, image.pictures[row.system]), False
    for row in (row for row in rows if row.kind == "codec"):
        figures = bench.result.figures_of(image.name, row.system)
        yield row.system, f"{figures.bytes} B · {_psnr(figures)}", image.pictures[row.system], False


def _maps(image: KeptImage, row: Row, view: TokenView) -> Iterable[Variant]:
    """The tokens as a grid, by code and by nearest word."""
    ids = image.token_ids[row.system]
    rows, columns = token_grid_shape(len(ids))
    note = f"{rows} × {columns} grid"
    yield "tokens", note, view.colours[ids].reshape(rows, columns, 3), True
    if view.word_colours is not None:
        yield "words", f"{note}, nearest words", view.word_colours[ids].reshape(rows, columns, 3), True


def _words(name: str, group: str, ids: np.ndarray, view: TokenView) -> str:
    """The strip of tokens in reading order, coloured by code or by nearest word."""
    rows, columns = token_grid_shape(len(ids))
    strips, choice = [view.colours[ids][None]], ""
    words = {int(i): view.words[i] for i in np.unique(ids)} if view.words else {}
    if view.word_colours is not None:
        strips.append(view.word_colours[ids][None])
        choice = (
            f'<fieldset class="metrics"><legend class="hide">Colours of the tokens of {name}</legend>'
            f'<label><input class="hide" type="radio" name="by {group}" value="0" checked><span>by code</span></label>'
            f'<label><input class="hide" type="radio" name="by {group}" value="1"><span>by nearest word</span></label>'
            "</fieldset>"
        )
    images = "".join(
        f'<img src="{data_uri(strip)}" alt="The tokens of {name} in reading order"{" hidden" if i else ""}>'
        for i, strip in enumerate(strips)
    )
    return f"""<div class="words" data-ids="{" ".join(str(int(i)) for i in ids)}" data-rows="{rows}"
 data-columns="{columns}" data-words="{escape(json.dumps(words, ensure_ascii=False))}">
{choice}<div class="sentence" style="--n:{len(ids)}">{images}<i></i>
<input type="range" min="0" max="{len(ids) - 1}" value="0" aria-label="Token of {name}">
</div>
<output>{len(ids):,} tokens in reading order. Move the slider to see the code at each position.</output>
</div>"""


def _note(figures: ImageFigures) -> str:
    return f"{_psnr(figures)} · {figures.values['ssim']:.3f}"


def _psnr(figures: ImageFigures) -> str:
    return f"{show_number(figures.values['psnr_db'] or 0.0, 2)} dB"
