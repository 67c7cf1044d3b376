"""One photo of the report: the original, every picture it can be compared with, and its tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from v2flow_cli.bench.evaluate import ImageFigures, KeptImage, Row
from v2flow_cli.bench.report.illustrations import error_map, token_grid_shape
from v2flow_cli.bench.report.tables import show_number
from v2flow_cli.bench.report.token_view import TokenView
from v2flow_cli.bench.run import Bench

MAX_ERROR_MAPS = 3  # with more tokenizers than this, only the one with the most tokens has an error map


@dataclass(frozen=True)
class Variant:
    """A picture that the photo can be compared with; ``sharp``: enlarge it without smoothing."""

    label: str
    note: str
    pixels: np.ndarray
    sharp: bool = False


@dataclass(frozen=True)
class Slider:
    """The lengths at which a tokenizer was measured in one setting: (text, system) of each, the shortest first."""

    setting: str
    steps: Sequence[tuple[str, str]]

    @property
    def json(self) -> str:
        return json.dumps(self.steps)


@dataclass(frozen=True)
class TokenStrip:
    """The ids in reading order.  strips: (1, L, 3) by code, then by nearest word; words: JSON, the word of each id."""

    ids: Sequence[int]
    grid: tuple[int, int]  # rows, columns
    strips: Sequence[np.ndarray]
    words: str


@dataclass(frozen=True)
class PhotoView:
    """What ``parts.html`` shows of a photo."""

    name: str
    size: int  # pixels
    reference: np.ndarray
    variants: Sequence[Variant]
    sliders: Sequence[Slider]
    tokens: TokenStrip | None


def photo_view(bench: Bench, image: KeptImage, views: Mapping[str, TokenView]) -> PhotoView:
    """The view of one photo; ``views`` by family colour the tokens of the longest sequence that has one."""
    reader = _longest([row for row in bench.result.coders if row.family in views])
    variants, tokens = [*_pictures(bench, image)], None
    if reader is not None:
        ids, view = image.token_ids[reader.system], views[reader.family]
        variants += _maps(ids, view)
        words = {int(i): view.words[i] for i in np.unique(ids)} if view.words else {}
        colours = [view.colours] if view.word_colours is None else [view.colours, view.word_colours]
        strips = [of_code[ids][None] for of_code in colours]
        tokens = TokenStrip(ids.tolist(), token_grid_shape(len(ids)), strips, json.dumps(words, ensure_ascii=False))
    sliders = _sliders(bench.result.coders)
    return PhotoView(image.name, bench.result.protocol.image_size, image.reference, variants, sliders, tokens)


def _longest(coders: Sequence[Row]) -> Row | None:
    """The tokenizer with the most tokens, the first of several; None of none."""
    return max(coders, key=lambda row: row.tokens_per_image or 0, default=None)


def _sliders(coders: Sequence[Row]) -> list[Slider]:
    """One for each tokenizer and setting with several lengths."""
    lengths: dict[str, dict[float, str]] = {}
    for row in coders:
        if row.tokens_per_image:
            swept = f"tokens {row.tokens_per_image:.0f}"
            setting = ", ".join(part for part in row.system.split(", ") if part != swept)
            lengths.setdefault(setting, {})[row.tokens_per_image] = row.system
    return [
        Slider(setting, [(f"{length:,.0f}", systems[length]) for length in sorted(systems)])
        for setting, systems in lengths.items()
        if len(systems) > 1
    ]


def _pictures(bench: Bench, image: KeptImage) -> Iterator[Variant]:
    """Reconstructions, the autoencoder's, error maps, then the codecs'."""
    rows, coders = bench.result.rows, bench.result.coders
    for row in [*coders, *(row for row in rows if row.kind == "autoencoder")]:
        figures = bench.result.figures_of(image.name, row.system)
        yield Variant(row.system, f"{_psnr(figures)} · {figures.values['ssim']:.3f}", image.pictures[row.system])
    longest = _longest(coders)
    for row in coders if len(coders) <= MAX_ERROR_MAPS or longest is None else [longest]:
        label = "error" if len(coders) == 1 else f"error, {row.system}"
        yield Variant(label, "absolute difference", error_map(image.reference, image.pictures[row.system]))
    for row in (row for row in rows if row.kind == "codec"):
        figures = bench.result.figures_of(image.name, row.system)
        yield Variant(row.system, f"{figures.bytes} B · {_psnr(figures)}", image.pictures[row.system])


def _maps(ids: np.ndarray, view: TokenView) -> Iterator[Variant]:
    """The tokens as rows of cells, by code and by nearest word."""
    rows, columns = token_grid_shape(len(ids))
    note = "in their order, row by row" if view.ordered else f"{rows} × {columns} grid"
    yield Variant("tokens", note, view.colours[ids].reshape(rows, columns, 3), sharp=True)
    if view.word_colours is not None:
        words = view.word_colours[ids].reshape(rows, columns, 3)
        yield Variant("words", f"{note}, nearest words", words, sharp=True)


def _psnr(figures: ImageFigures) -> str:
    return f"{show_number(figures.values['psnr_db'] or 0.0, 2)} dB"
