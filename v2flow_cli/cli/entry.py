"""How commands start and fail: quiet libraries, one error policy, help that fits the terminal."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import typer
import typer.core

from v2flow_cli.cli import endings
from v2flow_cli.cli.console import EXIT_FAILED, log, report_error
from v2flow_cli.cli.help_text import WholeHelp
from v2flow_cli.errors import V2FlowError, reason_of


@contextlib.contextmanager
def error_policy() -> Iterator[None]:
    """A V2FlowError is one message and exit code 1, an interrupt leaves with 130.

    So is what the operating system refuses (a folder without permission, a full disk) where no message of ours was
    nearer. Anything else is a bug, and keeps its traceback.

    Raises:  SystemExit.
    """
    try:
        yield
    except V2FlowError as error:
        report_error(error)
        raise SystemExit(EXIT_FAILED) from None
    except OSError as error:
        if error.filename is None:
            raise
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        report_error(V2FlowError(f"{name}: {reason_of(error)}."))
        raise SystemExit(EXIT_FAILED) from None
    except KeyboardInterrupt:
        log("interrupted")
        raise SystemExit(endings.EXIT_INTERRUPTED) from None


class ErrorPolicy(WholeHelp):
    """``error_policy`` for Typer's commands and groups: a mixin."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with error_policy():  # --help and --version print here
            return super().make_context(*args, **kwargs)  # type: ignore[misc]

    def invoke(self, ctx: Any) -> Any:
        with error_policy():
            return super().invoke(ctx)  # type: ignore[misc]


class _Command(ErrorPolicy, typer.core.TyperCommand):
    pass


def prepare() -> None:
    """Before a command: signals and streams as ``endings`` says; libraries neither print nor phone home."""
    endings.install()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def run_script(main: Callable[[], None]) -> None:
    """Run ``main``, which parses its own arguments, under the error policy of the commands."""
    prepare()
    try:
        with error_policy():
            main()
    finally:
        endings.restore_sigint()


def run(command: Callable[..., Any]) -> None:
    """Run ``command`` with the options of the command line: how the commands that are modules start."""
    prepare()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(cls=_Command)(command)
    try:
        app()
    finally:
        endings.restore_sigint()
