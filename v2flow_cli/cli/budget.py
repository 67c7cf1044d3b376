"""``v2flow budget``: all stages of a set of models within a wall time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from v2flow_cli.cli import options
from v2flow_cli.cli.console import log, result, result_json
from v2flow_cli.cli.text_table import text_table


def budget(
    file: Annotated[Path, typer.Argument(help="Budget (YAML): stages, their order, and their shares of the time.")],
    minutes: Annotated[float, typer.Option(help="Wall time for the unfinished stages.", show_default=False)],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="STAGE.KEY=VALUE", help="Override a key of a stage's recipe; repeatable."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="STAGE", help="Run this stage and those that it needs, not the others; repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check recipes and data, show the plan, stop.")] = False,
    json_: options.Json = False,
) -> None:
    """Train a set of models, from autoencoder to LLM, within a wall time.

    A repeated command continues stopped stages; after the end, it continues the training with more minutes.

    Examples:

        v2flow budget recipes/default/budget.yaml --minutes 10

        v2flow budget mine.yaml --minutes 1200 --set autoencoder.data.sources=[photos/] --dry-run
    """
    from v2flow_cli.errors import RecipeError
    from v2flow_cli.recipe.budget import load_budget

    if not 0 < minutes < float("inf"):
        raise RecipeError(f"--minutes {minutes:g}: expected a number above 0.")
    tree = load_budget(file, set_ or (), only or ())

    from v2flow_cli.training.budget import check_inputs, planned_seconds, run_budget, stages_to_do

    if dry_run:
        check_inputs(tree, stages_to_do(tree))
        plan = {name: seconds / 60 for name, seconds in planned_seconds(tree, minutes).items()}
        if json_:
            result_json({"minutes": plan})
            return
        for name, stage in tree.stages.items():
            state = f"{plan[name]:.1f} minutes" if name in plan else "done by an earlier run"
            result(f"{name}: {state}{f', after {chr(44).join(stage.after)}' if stage.after else ''}")
        return
    rows = run_budget(tree, minutes, log)
    if json_:
        result_json({"stages": [dataclasses.asdict(row) for row in rows]})
        return
    header = ("stage", "steps", "images/s", "of peak", "minutes", "figure")
    table = [
        (
            row.stage,
            f"{row.steps:,}" if row.steps else "-",
            "-" if row.images_per_s is None else f"{row.images_per_s:,.1f}",
            "-" if row.peak_share is None else f"{row.peak_share:.1%}",
            f"{row.seconds / 60:.1f}",
            row.figure,
        )
        for row in rows
    ]
    result(text_table(header, table))
