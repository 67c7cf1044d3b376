"""The report's plots as inline SVG: quality over tokens, bits a pixel and decoding speed, perception over distortion.

Means have their 95% intervals.

Published figures are not plotted: their protocol and pictures differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from v2flow_cli.bench.metrics import METRICS, Metric
from v2flow_cli.bench.results import Record, Table, length_curves

WIDTH, HEIGHT = 560, 380
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 16, 46  # pixels around the axes
HUES = 8  # series colours in report.html
TOKENS = "tokens_per_image"
AUTOENCODER = "autoencoder"  # rows of this kind are a limit line in a plot, not a point
PERCEPTION = tuple(m for m in METRICS if m.key in ("feature_distance", "lpips", "feature_frechet", "rfid"))


@dataclass(frozen=True)
class Axis:
    """A linear or (for positive values) logarithmic axis; ``at`` maps a value to [0, 1]."""

    low: float
    high: float
    log: bool

    @classmethod
    def around(cls, values: Sequence[float], log: bool) -> Axis:
        """An axis that contains all values, with a margin; never empty."""
        low, high = min(values), max(values)
        if log:
            room = max((high / low) ** 0.12, 1.3)
            return cls(low / room, high * room, True)
        room = max(0.1 * (high - low), 0.02 * abs(high), 1e-3)
        return cls(low - room, high + room, False)

    def at(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Four to eight round values."""
        if self.log:
            for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
                decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
                ticks = [m * 10.0**e for e in decades for m in steps if self.low <= m * 10.0**e <= self.high]
                if len(ticks) >= 4:
                    break
            return ticks
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
        return [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


@dataclass(frozen=True)
class Drawing:
    """A chart of one metric, by its key and its name."""

    metric: str
    name: str
    svg: Markup


@dataclass(frozen=True)
class Chart:
    """A figure with a drawing for each metric, of which the page shows one.  legend: families and their colours."""

    title: str
    group: str  # of the choice between the drawings
    drawings: Sequence[Drawing]
    legend: Sequence[tuple[str, int]]
    ceiling: bool  # whether the autoencoder limits it


def plots(table: Table) -> list[Chart]:
    """The plots of a table, each with a choice of metrics; a plot with fewer than two points is left out."""
    charts = [
        _chart(table, "bits_per_pixel", "bits a pixel", "Rate and distortion"),
        _chart(table, "decode_images_per_s", "images decoded a second", "Speed and quality"),
        _chart(table, "psnr_db", "PSNR in dB", "Perception and distortion", log=False, metrics=PERCEPTION),
    ]
    if length_curves(table):
        charts.insert(0, _chart(table, TOKENS, "tokens an image", "Length and quality"))
    return [chart for chart in charts if chart.drawings]


def _chart(
    table: Table, x: str, x_label: str, title: str, log: bool = True, metrics: Sequence[Metric] = METRICS
) -> Chart:
    drawings = []
    for metric in (metric for metric in metrics if metric.better):
        rows = [row for row in table.rows if row[x] and row.get(metric.key) is not None and row["kind"] != AUTOENCODER]
        if len(rows) > 1:
            name = metric.heading.removesuffix(" dB")
            svg = _drawing(table, rows, x, x_label, metric, f"{title}: {name} over {x_label}", log)
            drawings.append(Drawing(metric.key, name, Markup(svg)))
    families = dict.fromkeys(row["family"] for row in table.rows if row[x] and row["kind"] != AUTOENCODER)
    legend = [(family, _hue(table, family)) for family in families]
    return Chart(title, f"{x}-{table.size}", drawings, legend, bool(_ceilings(table, x)))


def _drawing(table: Table, rows: Sequence[Record], x: str, x_label: str, metric: Metric, title: str, log: bool) -> str:
    key, digits = metric.key, metric.decimals - 1
    label = metric.heading + (", less is better" if metric.better == "lower" else "")
    ceilings = [row for row in _ceilings(table, x) if row[key] is not None]
    across = Axis.around([row[x] for row in rows], log=log)
    shown = (*rows, *ceilings)
    ends = [row[key] + sign * (row.get(f"{key}_ci95") or 0) for row in shown for sign in (-1, 1)]
    up = Axis.around(ends, log=False)

    def point(row: Record) -> tuple[float, float]:
        return (
            LEFT + across.at(row[x]) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up.at(row[key]) * (HEIGHT - TOP - BOTTOM),
        )

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in up.ticks():
        y = HEIGHT - BOTTOM - up.at(tick) * (HEIGHT - TOP - BOTTOM)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.{digits}f}</text>')
    # The lengths are few; ticks between them are not useful.
    for tick in sorted({row[x] for row in rows}) if x == TOKENS else across.ticks():
        tick_x = LEFT + across.at(tick) * (WIDTH - LEFT - RIGHT)
        parts.append(f'<line class="grid" x1="{tick_x:.1f}" x2="{tick_x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{tick_x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>')
    below = f"{x_label} (log)" if log else x_label
    parts.append(f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{below}</text>')
    parts.append(f'<text class="axis" x="{LEFT + 6}" y="{TOP + 12}">{label}</text>')
    for row in ceilings:
        y = HEIGHT - BOTTOM - up.at(row[key]) * (HEIGHT - TOP - BOTTOM)
        parts.append(f'<line class="ceiling" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    on_top = sorted(rows, key=lambda row: row["kind"] != "codec")  # tokenizers are drawn over codecs
    for family in dict.fromkeys(row["family"] for row in on_top):
        curve = sorted((row for row in rows if row["family"] == family), key=lambda row: row[x])
        if len({row[x] for row in curve}) == len(curve) > 1:  # a sweep at one rate has no order on this axis
            line = " ".join(f"{a:.1f},{b:.1f}" for a, b in map(point, curve))
            parts.append(f'<polyline class="hue{_hue(table, family)}" points="{line}"/>')
        for row in curve:
            a, b = point(row)
            if interval := row.get(f"{key}_ci95"):
                reach = interval / (up.high - up.low) * (HEIGHT - TOP - BOTTOM)
                line_ends = f'x1="{a:.1f}" x2="{a:.1f}" y1="{b - reach:.1f}" y2="{b + reach:.1f}"'
                parts.append(f'<line class="interval hue{_hue(table, family)}" {line_ends}/>')
            tip = f"{row['system']}: {row[key]:.{digits + 1}f} at {row[x]:.4g} {x_label}"
            shape = (
                f'<rect x="{a - 5:.1f}" y="{b - 5:.1f}" width="10" height="10"'
                if row["kind"] == "codec"
                else f'<circle cx="{a:.1f}" cy="{b:.1f}" r="6"'
            )
            tag = shape.split(" ")[0][1:]
            parts.append(f'{shape} class="hue{_hue(table, family)}" tabindex="0"><title>{escape(tip)}</title></{tag}>')
    return "".join(parts) + "</svg>"


def _ceilings(table: Table, x: str) -> list[Record]:
    """Autoencoders limit the quality at any rate; they are not shown over speed."""
    return [row for row in table.rows if row["kind"] == AUTOENCODER and x == "bits_per_pixel"]


def _hue(table: Table, family: str) -> int:
    families = list(dict.fromkeys(row["family"] for row in table.rows if row["kind"] != AUTOENCODER))
    return families.index(family) % HUES
