"""The ``v2flow`` command: eight commands, one error policy."""

from __future__ import annotations

import math

from v2flow_cli.cli import endings

if __name__ == "__main__":  # python -m v2flow_cli.cli.app
    endings.install()

from typing import Annotated, Any, cast

import typer
import typer.core

from v2flow_cli import __version__
from v2flow_cli.cli import bench, budget, decode, encode, finetune_llm, generate, shard, train
from v2flow_cli.cli.console import result
from v2flow_cli.cli.entry import ErrorPolicy, prepare
from v2flow_cli.cli.help_text import WholeHelp


class _Command(WholeHelp, typer.core.TyperCommand):
    """A command whose numbers are finite: Typer's ranges let infinity pass."""

    def invoke(self, ctx: Any) -> Any:
        for parameter in self.params:
            value = ctx.params.get(parameter.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise typer.BadParameter(f"{value} is not a finite number", ctx, cast(Any, parameter))
        return super().invoke(ctx)


class _Commands(ErrorPolicy, typer.core.TyperGroup):
    """Refuses empty arguments."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "" in args:  # as a path it would be the current folder
            words = " ".join([*args[: args.index("")], "''"][-2:])
            raise typer.BadParameter(f"empty argument, such as from a variable that is not set: {words}", ctx)
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Commands,
    name="v2flow",
    help="Images as tokens of a language model: images to tokens, tokens to images, and LLMs that draw.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: formatting it with rich takes a third of the allowed half second
)
app.command("train")(train.train)
app.command("budget")(budget.budget)
app.command("encode", short_help="Turn images into token ids.")(encode.encode)
app.command("decode")(decode.decode)
app.command("shard", short_help="Pack images and captions into WebDataset tars.")(shard.shard)
app.command("finetune-llm", short_help="Train a causal LM on visual tokens, or pretrain one.")(
    finetune_llm.finetune_llm
)
app.command("generate")(generate.generate)
app.add_typer(bench.bench, name="bench", short_help="Measure reconstruction quality and speed.")
for command in (*app.registered_commands, *bench.bench.registered_commands):
    command.cls = _Command


def _version(show: bool) -> None:
    if show:
        result(f"v2flow {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Images as tokens of a language model: images to tokens, tokens to images, and LLMs that draw."""


def main() -> None:
    """Entry point."""
    prepare()
    try:
        app()
    finally:
        endings.restore_sigint()


if __name__ == "__main__":
    main()
