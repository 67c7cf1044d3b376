"""What ``v2flow bench`` prints on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from v2flow_cli.cli.console import is_main_process, result

if TYPE_CHECKING:
    from v2flow_cli.bench.metrics import Estimate
    from v2flow_cli.bench.run import Bench


def print_bench(found: Bench, waits: dict[str, float]) -> None:
    """Tables and figures on stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from v2flow_cli.bench.published import PUBLISHED, SOURCE

    if not is_main_process():
        return
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    protocol, codebook, speed = found.result.protocol, found.result.codebook, found.speed

    def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        grid = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD)
        for i, head in enumerate(heads):
            grid.add_column(head, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            grid.add_row(*row)
        console.print(grid)

    table(
        f"Measured on {protocol.count:,} images at {protocol.image_size} px (mean ± 95% interval; "
        f"protocol {protocol.key})",
        ["system", "bytes", "bits/pixel", "PSNR dB", "SSIM", "LPIPS"],
        [
            [
                row.system,
                "-" if row.bytes_per_image is None else f"{row.bytes_per_image:,.0f}",
                "-" if row.bits_per_pixel is None else f"{row.bits_per_pixel:.4f}",
                _show(row.psnr, 2),
                _show(row.ssim, 3),
                _show(row.lpips, 3),
            ]
            for row in found.result.rows
        ],
    )
    if protocol.image_size in PUBLISHED:
        table(
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
                for r in PUBLISHED[protocol.image_size]
            ],
        )
    result(
        f"codebook: {codebook.distinct:,} of {codebook.codebook_size:,} codes used ({codebook.usage:.1%}) by "
        f"{codebook.tokens:,} tokens; perplexity {codebook.perplexity:,.0f}, "
        f"{codebook.entropy_bits:.2f} bits a token"
    )
    if speed:
        result(
            f"speed: encode {speed.encode_images_per_s:.2f}, decode {speed.decode_images_per_s:.2f} images/s "
            f"(batch {speed.batch_size}, {speed.dtype}, {speed.device}); "
            f"peak memory {speed.peak_memory_bytes / 2**30:.2f} GiB {speed.peak_memory_kind}"
        )
    if waits:
        slowest = max(waits, key=lambda command: waits[command])
        result(f"--help: {waits['']:.2f} s; the slowest command, {slowest or 'v2flow'}: {waits[slowest]:.2f} s")


def _show(value: Estimate | None, digits: int) -> str:
    if value is None:
        return "-"
    mean = "inf" if value.mean == float("inf") else f"{value.mean:.{digits}f}"
    return mean if value.ci95 != value.ci95 else f"{mean} ± {value.ci95:.{digits}f}"
