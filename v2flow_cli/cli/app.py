"""The ``v2flow`` command: eight commands, one error policy."""

from __future__ import annotations

import math
import os

from v2flow_cli.cli import endings

if __name__ == "__main__":  # python -m v2flow_cli.cli.app
    endings.install()

from typing import Annotated, Any, cast

import typer
import typer.core

from v2flow_cli import __version__
from v2flow_cli.cli import bench, budget, decode, encode, finetune_llm, generate, shard, train
from v2flow_cli.cli.console import EXIT_FAILED, log, report_error
from v2flow_cli.cli.endings import EXIT_INTERRUPTED
from v2flow_cli.errors import V2FlowError, reason_of


class _Command(typer.core.TyperCommand):
    """A command that rejects infinity and NaN, which Typer's ranges accept."""

    def invoke(self, ctx: Any) -> Any:
        for parameter in self.params:
            value = ctx.params.get(parameter.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise typer.BadParameter(f"{value} is not a finite number", ctx, cast(Any, parameter))
        return super().invoke(ctx)


class _Commands(typer.core.TyperGroup):
    """One error policy: a V2FlowError is one message and exit code 1, an interrupt exit code 130.

    An OSError with a file name (no permission, a full disk) is treated like a V2FlowError. Anything else is a bug, and
    keeps its traceback.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "" in args:  # as a path it would be the current folder
            words = " ".join([*args[: args.index("")], "''"][-2:])
            raise typer.BadParameter(f"empty argument, such as from a variable that is not set: {words}", ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except V2FlowError as error:
            report_error(error)
            ctx.exit(EXIT_FAILED)
        except OSError as error:
            if error.filename is None:
                raise
            name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
            report_error(V2FlowError(f"{name}: {reason_of(error)}."))
            ctx.exit(EXIT_FAILED)
        except KeyboardInterrupt:
            log("interrupted")
            ctx.exit(EXIT_INTERRUPTED)


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
        print(f"v2flow {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Images as tokens of a language model: images to tokens, tokens to images, and LLMs that draw."""


def main() -> None:
    """Entry point; sets the variables that silence libraries before they are imported."""
    endings.install()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    finally:
        endings.restore_sigint()


if __name__ == "__main__":
    main()
