"""``v2flow finetune-llm``: a small LM from text, or a causal LM trained on visual tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from v2flow_cli.cli import options
from v2flow_cli.cli.console import log, result, result_json
from v2flow_cli.cli.endings import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from v2flow_cli.training.llm_trainer import TrainingReport


def finetune_llm(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe of kind `finetune`, or `lm`.")],
    set_: options.Set = None,
    resume: options.Resume = False,
    approximate: options.Approximate = False,
    push: options.Push = None,
    public: options.Public = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report sizes and estimates, then stop.")] = False,
    json_: options.Json = False,
) -> None:
    """Train a Hugging Face causal LM on visual tokens, or pretrain a small LM from text.

    Examples:

        v2flow finetune-llm recipes/default/lm.yaml --set 'text=[README.md]' --dry-run

        v2flow finetune-llm recipes/tiny/lm.yaml --set train.steps=20 --set output=runs/my-lm

        v2flow finetune-llm recipes/default/llm.yaml --resume

        v2flow finetune-llm recipes/default/llm.yaml --push me/my-llm --set card.license=apache-2.0
    """
    from v2flow_cli.recipe import FinetuneRecipe, LMRecipe, load_recipe

    spec = load_recipe(recipe, set_ or (), kinds=("lm", "finetune"))
    plan: Callable[[], dict[str, Any]]
    run: Callable[..., TrainingReport]
    if isinstance(spec, FinetuneRecipe):
        from v2flow_cli.training.objectives import drawing

        plan, run = partial(drawing.plan, spec), partial(drawing.finetune, spec)
    else:
        from v2flow_cli.training.objectives import language_model

        assert isinstance(spec, LMRecipe)  # the other of the two kinds
        plan, run = partial(language_model.plan, spec), partial(language_model.pretrain, spec)
    if dry_run:
        for key, value in (estimates := plan(resume=resume)).items():
            if not json_:
                result(f"{key}: {value:,.4g}" if isinstance(value, float) else f"{key}: {value:,}")
        if json_:
            result_json(estimates)
        return

    from v2flow_cli.cli.push import prepare_push, push_result
    from v2flow_cli.training.checkpoint import Interrupted

    prepare_push(push, public, spec.card.license)
    try:
        report = run(log=log, resume=resume, approximate=approximate)
    except Interrupted as stop:
        log(f"{stop}; continue with --resume")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    page = push_result(push, report.output)
    if json_:
        result_json({**dataclasses.asdict(report), "pushed": page})
        return
    held_out = "" if report.eval_loss is None else f", held out {report.eval_loss:.3f}"
    result(
        f"{report.output}: {report.parameters:,} parameters, {report.steps} steps in {report.minutes:.1f} minutes, "
        f"loss {report.train_loss:.3f}{held_out} nats a token"
    )
    if page:
        result(page)
