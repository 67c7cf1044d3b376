"""The folder that a training writes to: whether it may be, which a dry run asks as the run does."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from v2flow_cli.errors import ModelError, reason_of
from v2flow_cli.store.lock import locked
from v2flow_cli.store.paths import user_path

OTHER = "choose another folder with --set output=FOLDER"
Settings = ParamSpec("Settings")
Result = TypeVar("Result")


def alone_in_output(
    training: Callable[Concatenate[Any, Settings], Result],
) -> Callable[Concatenate[Any, Settings], Result]:
    """``training(recipe, ...)``, which holds a lock on ``recipe.output`` as long as it runs; rank 0 holds it for all.

    Raises:  DataError where another run holds it.
    """

    @functools.wraps(training)
    def alone(recipe: Any, *args: Settings.args, **kwargs: Settings.kwargs) -> Result:
        if int(os.environ.get("RANK", "0")):
            return training(recipe, *args, **kwargs)
        check_output(recipe.output, resume=True)  # a sentence where the folder cannot be made
        with locked(user_path(recipe.output)):
            return training(recipe, *args, **kwargs)

    return alone


def check_output(output: str | Path, resume: bool) -> None:
    """Raises: ModelError for an output folder that cannot be written, or holds a run that would be lost; makes none."""
    folder = user_path(output)
    holds = [*folder.glob("checkpoints/step-*"), *folder.glob("checkpoints/checkpoint-*")]
    holds += [path for name in ("model.safetensors", "config.json") if (path := folder / name).exists()]
    if holds and not resume:
        raise ModelError(
            f"output {output}: already holds a run ({holds[0].relative_to(folder)}). Continue it with --resume, "
            f"{OTHER}, or delete it."
        )
    if folder.is_file():
        raise ModelError(f"output {output}: a file; expected a folder, which is made where there is none; {OTHER}.")
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent  # the nearest that exists has to be a folder that can be written
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        what = f"output {output}: cannot be written" + (f", since {place} cannot" if place != folder else "")
        raise ModelError(f"{what} ({reason_of(error)}); {OTHER}.") from error
