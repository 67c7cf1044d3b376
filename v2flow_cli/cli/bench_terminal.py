"""What ``v2flow bench`` prints on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from v2flow_cli.cli.console import result
from v2flow_cli.cli.text_table import text_table

CURVE_WIDTH = 40  # columns of the terminal's plot of PSNR over length

if TYPE_CHECKING:
    from v2flow_cli.bench.results import Table


def print_tables(tables: Sequence[Table]) -> None:
    """Print every table, the published one of its size below it, then the codebooks."""
    from v2flow_cli.bench.published import PUBLISHED, SOURCE
    from v2flow_cli.bench.results import codes_text, columns, shown, speed_text

    for table in tables:
        protocol, metrics = table.protocol, columns(table)
        result(
            f"Measured on {protocol['count']:,} images at {table.size} px (mean ± 95% interval; protocol "
            f"{protocol['key']})\n"
        )
        rows = [[row["system"], *(shown(metric, row) for metric in metrics)] for row in table.rows]
        result(text_table(["system", *(metric.heading for metric in metrics)], rows) + "\n")
        if table.size in PUBLISHED:
            result(f"Published, not measured here, on other images: {SOURCE}\n")
            heads = ["published", "tokens", "codebook", "PSNR dB", "SSIM", "LPIPS"]
            rows = [
                [r.system, f"{r.tokens:,}", f"{r.codebook_size:,}", f"{r.psnr:.2f}", f"{r.ssim:.2f}", f"{r.lpips:.2f}"]
                for r in PUBLISHED[table.size]
            ]
            result(text_table(heads, rows) + "\n")
        for row in table.rows:
            if row["codebook"]:
                result(f"{row['system']}: {codes_text(row)}")
            if row["speed"]:
                result(f"  {speed_text(row)}")
        _print_curves(table)


def _print_curves(table: Table) -> None:
    """PSNR over the number of tokens, a line for each length, for the families with several lengths."""
    from v2flow_cli.bench.results import length_curves

    for family, rows in length_curves(table).items():
        known = [row for row in rows if row["psnr_db"] is not None]
        if len(known) < 2:
            continue
        reaches = [row["psnr_db_ci95"] or 0.0 for row in known]
        low = min(row["psnr_db"] - reach for row, reach in zip(known, reaches))
        high = max(row["psnr_db"] + reach for row, reach in zip(known, reaches))

        def column(value: float, low: float = low, high: float = high) -> int:
            return round((value - low) / max(high - low, 1e-9) * (CURVE_WIDTH - 1))

        lines, before = [], None
        for row, reach in zip(known, reaches):
            mean = row["psnr_db"]
            bar = [" "] * CURVE_WIDTH
            for place in range(column(mean - reach), column(mean + reach) + 1):
                bar[place] = "-"
            bar[column(mean)] = "o"
            gain = "" if before is None else f"{mean - before:+.2f}"
            lines.append([f"{row['tokens_per_image']:,.0f}", f"{mean:.2f} ± {reach:.2f}", gain, "".join(bar).rstrip()])
            before = mean
        heads = ("tokens", "PSNR dB", "gain", f"{low:.1f} dB".ljust(CURVE_WIDTH - 8) + f"{high:.1f} dB")
        widths = [max(len(line[i]) for line in (heads, *lines)) for i in range(3)]
        result(f"{family}: PSNR by length (o mean, --- 95% interval)\n")
        for line in (heads, *lines):
            numbers = "  ".join(cell.rjust(width) for cell, width in zip(line, widths))
            result(f"{numbers}  {line[3]}".rstrip())
        result("")


def print_first_answers(seconds: Mapping[str, float]) -> None:
    """Print the seconds to the first result of each command, also as multiples of the import of torch."""
    if seconds:
        torch = seconds["import torch"]
        times = [f", {name} {value:.2f} s ({value / torch:.1f}x)" for name, value in seconds.items()][1:]
        result(f"first answer: import torch {torch:.2f} s" + "".join(times))
