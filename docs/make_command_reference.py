"""Write the help of each command (``v2flow COMMAND --help``) into its page.

    python docs/make_command_reference.py

Each page (``docs/COMMAND.md``) is written by hand, except one block between two marks, which this script writes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer.main

from v2flow_cli.cli.app import app

DOCS = Path(__file__).resolve().parent
WIDTH = 110  # columns of the help
BLOCK = re.compile(r"<!-- help:begin.*?<!-- help:end -->\n", re.S)
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def block(name: str) -> str:
    """The help of a command as one Markdown block."""
    command = COMMANDS[name]
    modes = getattr(command, "commands", {})  # of a group, such as bench
    texts = [help_of(f"v2flow {name}", command), *(help_of(f"v2flow {name} {mode}", modes[mode]) for mode in modes)]
    blocks = "\n".join(f"```text\n{text}\n```\n" for text in texts)
    return (
        "<!-- help:begin; written by docs/make_command_reference.py: edit the command, then run that -->\n"
        f"## All options\n\n{blocks}<!-- help:end -->\n"
    )


def help_of(line: str, command: Any) -> str:
    """The output of ``line --help``."""
    context = command.context_class(command, info_name=line, terminal_width=WIDTH, max_content_width=WIDTH)
    return "\n".join(part.rstrip() for part in command.get_help(context).splitlines())


def page_with_block(text: str, name: str) -> str:
    """``text`` of a page with its block updated; a page without a block gets one at its end."""
    if BLOCK.search(text):
        return BLOCK.sub(lambda _: block(name), text)
    return text.rstrip("\n") + "\n\n" + block(name)


if __name__ == "__main__":
    for name in COMMANDS:
        page = DOCS / f"{name}.md"
        page.write_text(page_with_block(page.read_text(encoding="utf-8"), name), encoding="utf-8")
