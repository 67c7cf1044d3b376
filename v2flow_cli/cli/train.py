"""``v2flow train``: an autoencoder or a tokenizer from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from v2flow_cli.cli import options
from v2flow_cli.cli.console import fail, log, result, result_json, steps_bar
from v2flow_cli.cli.endings import EXIT_INTERRUPTED


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe of kind autoencoder or tokenizer (YAML).")],
    set_: options.Set = None,
    resume: options.Resume = False,
    approximate: options.Approximate = False,
    push: options.Push = None,
    public: options.Public = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Validate, report sizes, and stop.")] = False,
    json_: options.Json = False,
) -> None:
    """Train an autoencoder or a V2Flow tokenizer from photos.

    Examples:

        v2flow train recipes/default/tokenizer.yaml --dry-run

        v2flow train recipes/tiny/autoencoder.yaml --set data.sources=[photos/] --set output=runs/ae

        v2flow train recipes/default/tokenizer.yaml --push me/my-tokenizer --set card.license=cc-by-4.0

        accelerate launch -m v2flow_cli.cli.app train recipes/default/tokenizer.yaml --resume
    """
    from v2flow_cli.recipe import AutoencoderRecipe, TokenizerRecipe, load_recipe

    tree = load_recipe(recipe, set_ or (), kinds=("autoencoder", "tokenizer"))
    assert isinstance(tree, AutoencoderRecipe | TokenizerRecipe)  # of these kinds
    if dry_run:
        from v2flow_cli.training.plan import plan

        report = plan(tree, resume)
        missing = report.get("missing", [])
        if json_:
            result_json(report)
        else:
            for key, value in report.items():
                if key != "missing":
                    result(f"{key}: {value:,}" if isinstance(value, int) else f"{key}: {value}")
        for reason in missing:
            log(f"missing: {reason}")
        if missing:
            fail(f"{recipe}: the run would not start; {len(missing)} reason(s) above.")
        return

    from v2flow_cli.cli.push import prepare_push, push_result
    from v2flow_cli.training.checkpoint import Interrupted
    from v2flow_cli.training.loop import train as run

    prepare_push(push, public, tree.card.license)
    try:
        with steps_bar("train", tree.train.steps) as at_step:
            trained = run(tree, resume=resume, log=log, approximate=approximate, at_step=at_step)
    except Interrupted as stop:
        log(f"{stop}; continue with --resume")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    page = push_result(push, trained.folder)
    if json_:
        result_json({**trained.__dict__, "folder": str(trained.folder), "pushed": page})
    else:
        result(f"{trained.folder}: {trained.steps} steps, {trained.images} images, {trained.seconds / 60:.1f} minutes")
        if page:
            result(page)
