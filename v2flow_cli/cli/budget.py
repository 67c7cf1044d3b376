"""``v2flow budget``: every stage of a set of models, in the wall time that is given."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from v2flow_cli.cli.console import log, result, result_json


def budget(
    file: Annotated[Path, typer.Argument(help="Budget (YAML): stages, what each needs, its share of the time.")],
    minutes: Annotated[float, typer.Option(help="Wall time for what is still to do.", show_default=False)],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="STAGE.KEY=VALUE", help="Override a key of a stage's recipe; repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check recipes and data, show the plan, stop.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Train a whole set of models, autoencoder to LLM, in a given wall time.

    A stage that was stopped goes on where it was, and a second run with more minutes goes on from the first.

    Examples:

        v2flow budget recipes/default/budget.yaml --minutes 10

        v2flow budget mine.yaml --minutes 1200 --set autoencoder.data.sources=[photos/] --dry-run
    """
    from v2flow_cli.errors import RecipeError
    from v2flow_cli.recipe.budget import load_budget

    if not 0 < minutes < float("inf"):
        raise RecipeError(f"--minutes {minutes:g}: expected a number above 0.")
    tree = load_budget(file, set_ or ())

    from v2flow_cli.training.budget import check_inputs, planned_seconds, run_budget, stages_to_do

    if dry_run:
        check_inputs(tree, stages_to_do(tree))
        plan = {name: seconds / 60 for name, seconds in planned_seconds(tree, minutes).items()}
        if json_:
            result_json({"minutes": plan})
            return
        for name, stage in tree.stages.items():
            what = f"{plan[name]:.1f} minutes" if name in plan else "done by an earlier run"
            result(f"{name}: {what}{f', after {chr(44).join(stage.after)}' if stage.after else ''}")
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
    widths = [max(map(len, column)) for column in zip(header, *table)]
    for row_ in (header, *table):
        cells = [cell.ljust(widths[0]) if i in (0, 5) else cell.rjust(widths[i]) for i, cell in enumerate(row_)]
        result("  ".join(cells).rstrip())
