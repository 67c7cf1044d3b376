"""Starts commands that are modules: quiet libraries, and a V2FlowError as one message."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import typer

from v2flow_cli.cli.console import fail
from v2flow_cli.errors import V2FlowError


def run(command: Callable[..., Any]) -> None:
    """Run ``command`` with the options of the command line; a V2FlowError is exit code 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        typer.run(command)
    except V2FlowError as error:
        fail(str(error))
