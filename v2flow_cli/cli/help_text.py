"""``--help`` at any width: no line wider than the terminal but the examples, which stay lines that can be pasted."""

from __future__ import annotations

import re
import shutil
from typing import Any

import typer.core

from v2flow_cli.cli.console import result

WIDEST, NARROW = 80, 60  # columns: of prose, and below which an option and its text do not stand side by side
# Typer brings its own copy of click, under a private name.
_Context: Any = typer.core.TyperCommand.context_class
_Formatter: Any = _Context.formatter_class
_EXAMPLE = re.compile(r"( *)((?:v2flow|torchrun|accelerate|python) .*)")


class HelpFormatter(_Formatter):
    """Wraps prose, and leaves examples whole."""

    def write_text(self, text: str) -> None:
        paragraphs = []
        for paragraph in text.split("\n\n"):
            example = _EXAMPLE.fullmatch(paragraph.rstrip("\n"))  # on one line; \b is click's mark of lines kept whole
            paragraphs.append(f"{example[1]}\b\n{example[2]}" if example else paragraph)
        super().write_text("\n\n".join(paragraphs))

    def write_dl(self, rows: Any, col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl(rows, col_max if self.width >= NARROW else 4, col_spacing)


class HelpContext(_Context):
    """A context whose help fits the terminal; click's has at least 50 columns."""

    formatter_class = HelpFormatter

    def make_formatter(self) -> HelpFormatter:
        columns = shutil.get_terminal_size(fallback=(WIDEST, 24)).columns
        return HelpFormatter(width=self.terminal_width or max(20, min(columns, WIDEST) - 2))


class WholeHelp:
    """A mixin for Typer's commands and groups: help that fits the terminal, of which nothing is cut."""

    context_class: Any = HelpContext
    help: str | None
    short_help: str | None

    def get_help_option(self, ctx: Any) -> Any:
        """``--help``; it prints as a result is printed, where click lets the error of a full disk pass."""
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.callback = _show_help
        return option

    def get_short_help_str(self, limit: int = 0) -> str:
        """The line in the list of commands: the whole first sentence, where click takes as many words as fit."""
        first = " ".join((self.short_help or self.help or "").strip().split("\n\n")[0].split())
        return first.split(". ")[0]


def _show_help(ctx: Any, parameter: Any, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        result(ctx.get_help())
        ctx.exit()
