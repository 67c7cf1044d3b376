"""What ``v2flow bench`` prints on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from v2flow_cli.cli.console import is_main_process, result

if TYPE_CHECKING:
    from v2flow_cli.bench.results import Record, Table

WIDTH_OF_A_FILE = 170  # columns, where stdout is no terminal


def print_tables(found: Sequence[Table]) -> None:
    """Every table, the published one of its size below it, then the codebooks."""
    from v2flow_cli.bench.published import PUBLISHED, SOURCE

    for table in found:
        protocol = table.protocol
        heads, lines = _columns(table)
        _print_grid(
            f"Measured on {protocol['count']:,} images at {table.size} px (mean ± 95% interval; protocol "
            f"{protocol['key']})",
            heads,
            lines,
        )
        if table.size in PUBLISHED:
            _print_grid(
                f"Published, not measured here, on other images: {SOURCE}",
                ["published", "tokens", "codebook", "PSNR dB", "SSIM", "LPIPS"],
                [
                    [
                        r.system,
                        f"{r.tokens:,}",
                        f"{r.codebook_size:,}",
                        f"{r.psnr:.2f}",
                        f"{r.ssim:.2f}",
                        f"{r.lpips:.2f}",
                    ]
                    for r in PUBLISHED[table.size]
                ],
            )
        for row in table.rows:
            _print_codes(row)


def _columns(table: Table) -> tuple[list[str], list[list[str]]]:
    """Headings and lines, without the columns that no row fills."""
    columns = {
        "system": [row["system"] for row in table.rows],
        "tokens": [_number(row["tokens_per_image"], 0) for row in table.rows],
        "bytes": [_number(row["bytes_per_image"], 0) for row in table.rows],
        "bits/px": [_number(row["bits_per_pixel"], 4) for row in table.rows],
        "entropy bits/px": [_number(row["entropy_bits_per_pixel"], 4) for row in table.rows],
        "PSNR dB": [_interval(row, "psnr_db", 2) for row in table.rows],
        "SSIM": [_interval(row, "ssim", 3) for row in table.rows],
        "MS-SSIM": [_interval(row, "ms_ssim", 3) for row in table.rows],
        "LPIPS": [_interval(row, "lpips", 3) for row in table.rows],
        "rFID": [_number(row["rfid"], 2) for row in table.rows],
        "encode/s": [_number(row["encode_images_per_s"], 2) for row in table.rows],
        "decode/s": [_number(row["decode_images_per_s"], 2) for row in table.rows],
    }
    always = ("PSNR dB", "SSIM", "LPIPS", "rFID")  # an empty one says that it was left out; a note says why
    kept = {head: cells for head, cells in columns.items() if head in always or any(cell != "-" for cell in cells)}
    return list(kept), [list(line) for line in zip(*kept.values())]


def _print_codes(row: Record) -> None:
    codebook, speed = row["codebook"], row["speed"]
    if codebook:
        result(
            f"{row['system']}: {codebook['distinct']:,} of {codebook['codebook_size']:,} codes used "
            f"({codebook['usage']:.1%}) by {codebook['tokens']:,} tokens; perplexity {codebook['perplexity']:,.0f}; "
            f"{codebook['entropy_bits']:.2f} bits a token by their entropy, {codebook['adaptive_bits']:.2f} by an "
            "adaptive code"
        )
    if speed:
        result(
            f"  speed: encode {speed['encode_images_per_s']:.2f}, decode {speed['decode_images_per_s']:.2f} images/s "
            f"(batch {speed['batch_size']}, {speed['dtype']}, {speed['device']}); "
            f"peak memory {speed['peak_memory_bytes'] / 2**30:.2f} GiB {speed['peak_memory_kind']}"
        )


def print_waits(waits: Mapping[str, float]) -> None:
    """How soon ``--help`` answers."""
    if waits:
        slowest = max(waits, key=lambda command: waits[command])
        result(f"--help: {waits['']:.2f} s; the slowest command, {slowest or 'v2flow'}: {waits[slowest]:.2f} s")


def _print_grid(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid

    if not is_main_process():
        return
    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE, highlight=False)
    grid = Grid(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD)
    for i, head in enumerate(heads):
        grid.add_column(head, justify="right" if i else "left", no_wrap=bool(i))
    for row in rows:
        grid.add_row(*row)
    console.print(grid)


def _number(value: Any, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _interval(row: Record, name: str, digits: int) -> str:
    """Mean and half-width; PSNR of equal pictures is infinite, which a record holds as null."""
    value, ci95 = row[name], row[f"{name}_ci95"]
    if value is None:
        return "inf" if name == "psnr_db" else "-"
    return f"{value:.{digits}f}" if ci95 is None else f"{value:.{digits}f} ± {ci95:.{digits}f}"
