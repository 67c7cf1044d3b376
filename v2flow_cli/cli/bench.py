"""``v2flow bench``: a group of modes; ``reconstruction`` is the default.

A mode is one file, ``cli/bench_NAME.py``, and one line here. For older scripts a mode's name may also be written as an
option (``bench --llm``).
"""

from __future__ import annotations

from typing import Any

import typer
import typer.core

from v2flow_cli.cli import bench_alignment, bench_cost, bench_draw, bench_join, bench_llm, bench_reconstruction
from v2flow_cli.cli.help_text import WholeHelp

DEFAULT = "reconstruction"
RECIPE_SUFFIXES = (".yaml", ".yml")


class _Modes(WholeHelp, typer.core.TyperGroup):
    """The first word names the mode; without one it is ``reconstruction``, or ``cost`` where a recipe is given."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, "--help"}:
            args = self._with_mode(args)
        return super().parse_args(ctx, args or [DEFAULT])

    def _with_mode(self, args: list[str]) -> list[str]:
        modes = [mode for mode in self.commands if f"--{mode}" in args]
        if len(modes) > 1:
            raise typer.BadParameter(f"--{modes[0]} and --{modes[1]}: bench has one mode at a time.")
        if modes:
            return [modes[0], *(arg for arg in args if arg != f"--{modes[0]}")]
        if any(arg.endswith(RECIPE_SUFFIXES) for arg in args):
            return ["cost", *(arg for arg in args if arg != "--speed")]
        return [DEFAULT, *args]


bench = typer.Typer(
    cls=_Modes,
    help="""Measure tokenizers, language models that draw, and recipes.

    Without a mode, images are measured; `v2flow bench reconstruction --help` has the options.

    Examples:

        v2flow bench

        v2flow bench imgs/ --res 256,512 --report bench.html

        v2flow bench imgs/ --sweep cfg=1,2,3 --sweep solver=euler,heun --csv table.csv --no-speed

        v2flow bench llm captioned/

        v2flow bench draw drawings.tar --features features.safetensors --report sheet.html

        v2flow bench alignment imgs/ --plot alignment.png

        v2flow bench cost recipes/paper/512px-256.yaml --batches 1,4

        v2flow bench join first.json second.json
    """,
    subcommand_metavar="[MODE] [ARGUMENTS]...",
    rich_markup_mode=None,
)
bench.command("reconstruction", short_help="Images: PSNR, SSIM, LPIPS, rFID, bits, speed.")(
    bench_reconstruction.reconstruction
)
bench.command("llm", short_help="Whether an LLM's images follow their captions.")(bench_llm.llm)
bench.command("draw", short_help="Whether drawings show the things of their prompts.")(bench_draw.draw)
bench.command("alignment", short_help="Visual tokens among the LLM's words.")(bench_alignment.alignment)
bench.command("cost", short_help="A recipe's FLOPs, speed and memory.")(bench_cost.cost)
bench.command("join", short_help="Saved results in one table.")(bench_join.join)
