"""What ``v2flow bench`` prints on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from v2flow_cli.cli.console import result
from v2flow_cli.cli.text_table import text_table

if TYPE_CHECKING:
    from v2flow_cli.bench.results import Record, Table


def print_tables(tables: Sequence[Table]) -> None:
    """Every table, the published one of its size below it, then the codebooks."""
    from v2flow_cli.bench.published import PUBLISHED, SOURCE
    from v2flow_cli.bench.results import columns, shown

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
            _print_codes(row)


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


def print_help_seconds(seconds: Mapping[str, float]) -> None:
    """How long ``--help`` takes."""
    if seconds:
        slowest = max(seconds, key=lambda command: seconds[command])
        result(f"--help: {seconds['']:.2f} s; the slowest command, {slowest or 'v2flow'}: {seconds[slowest]:.2f} s")


def print_first_answers(seconds: Mapping[str, float]) -> None:
    """How long the first picture of each command takes, beside the import of torch."""
    if seconds:
        result("first answer: " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
