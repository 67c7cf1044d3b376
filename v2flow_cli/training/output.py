"""Checks and locks the output folder of a training."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from v2flow_cli.errors import ModelError, foreign_errors
from v2flow_cli.runtime.publishing import publishing
from v2flow_cli.store.lock import locked
from v2flow_cli.store.paths import not_writable, user_path

OTHER = "choose another folder with --set output=FOLDER"
Settings = ParamSpec("Settings")
Result = TypeVar("Result")


def alone_in_output(
    training: Callable[Concatenate[Any, Settings], Result],
) -> Callable[Concatenate[Any, Settings], Result]:
    """``training(recipe, ...)`` with a lock on ``recipe.output`` while it runs; rank 0 holds it for all.

    Raises:  DataError if another run holds it.
    """

    @functools.wraps(training)
    def alone(recipe: Any, *args: Settings.args, **kwargs: Settings.kwargs) -> Result:
        if int(os.environ.get("RANK", "0")):
            return training(recipe, *args, **kwargs)
        check_output(recipe.output, resume=True)  # a clear error if the folder cannot be created
        with locked(user_path(recipe.output)):
            return training(recipe, *args, **kwargs)

    return alone


@contextlib.contextmanager
def publishing_model(folder: Path) -> Iterator[Path]:
    """As ``publishing``, for a finished model.  Raises: ModelError if it cannot be written."""
    # safetensors and tokenizers have their own exceptions for a full disk
    with foreign_errors(f"{folder}: the model cannot be written", "Free some space, then --resume."):
        with publishing(folder) as partial:
            yield partial


def check_output(output: str | Path, resume: bool) -> None:
    """Raises: ModelError for an output folder that cannot be written, or holds a run that would be lost."""
    folder = user_path(output)
    files = [*folder.glob("checkpoints/step-*"), *folder.glob("checkpoints/checkpoint-*")]
    files += [path for name in ("model.safetensors", "config.json") if (path := folder / name).exists()]
    if files and not resume:
        raise ModelError(
            f"output {output}: already holds a run ({files[0].relative_to(folder)}). Continue it with --resume, "
            f"{OTHER}, or delete it."
        )
    if folder.is_file():
        raise ModelError(f"output {output}: a file; expected a folder, which need not exist; {OTHER}.")
    if problem := not_writable(folder):
        raise ModelError(f"output {output}: {problem}; {OTHER}.")
