"""``v2flow bench cost RECIPE.yaml``: the cost of a recipe's tokenizer, before it is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from v2flow_cli.cli import options
from v2flow_cli.cli.console import log, result, result_json
from v2flow_cli.cli.text_table import text_table

if TYPE_CHECKING:
    from v2flow_cli.bench.recipe_cost import RecipeSpeed


def cost(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="Recipe of kind tokenizer.")],
    batches: Annotated[str, typer.Option(metavar="N,...", help="Batch sizes.")] = "1,4,16",
    res: Annotated[int | None, typer.Option(min=16, help="Side of the image in pixels. Default: the recipe's.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes; the median counts.")] = 1,
    autoencoder: Annotated[bool, typer.Option("--autoencoder", help="Time the autoencoder too.")] = False,
    cfg: options.Cfg = None,
    rounds: options.Rounds = None,
    steps: options.Steps = None,
    solver: options.SolverName = None,
    schedule: options.Schedule = None,
    guidance: options.GuidanceKind = None,
    noise: options.Noise = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json_: options.Json = False,
) -> None:
    """Measure FLOPs, images/s, share of the matmul peak and memory of a recipe's tokenizer with random weights.

    Examples:

        v2flow bench cost recipes/paper/512px-256.yaml --batches 1,4
    """
    from v2flow_cli.recipe import TokenizerRecipe, load_recipe

    tree = load_recipe(recipe, kinds=("tokenizer",))
    assert isinstance(tree, TokenizerRecipe)

    from v2flow_cli.bench.recipe_cost import measure_recipe
    from v2flow_cli.runtime.device import pick_device, pick_dtype

    target = pick_device(device)
    measured = measure_recipe(
        tree,
        batch_sizes=options.numbers("--batches", batches, 1),
        size=res,
        repeats=repeats,
        autoencoder=autoencoder,
        device=target,
        dtype=pick_dtype(dtype, target),
        **options.sampling(
            cfg=cfg, rounds=rounds, steps=steps, solver=solver, schedule=schedule, guidance=guidance, noise=noise
        ),
    )
    if json_:
        result_json({"recipe": str(recipe), **dataclasses.asdict(measured)})
    else:
        _print(str(recipe), measured)
    for note in measured.notes:
        log(note)


def _print(name: str, measured: RecipeSpeed) -> None:
    settings = ", ".join(f"{key} {value}" for key, value in measured.settings.items() if value is not None)
    result(
        f"{name}: {measured.image_size} px, {measured.tokens:,} tokens, {measured.patches:,} patches, "
        f"{measured.parameters / 1e6:,.0f}M parameters, random weights"
    )
    result(f"decode with {settings}")
    result(
        f"{measured.device}, {measured.dtype}, {measured.threads} threads; matmul peak of this run "
        f"{measured.matmul_peak_gflop_per_s:,.0f} GFLOP/s\n"
    )
    heads = ("part", "batch", "GFLOP/image", "s", "images/s", "of matmul peak", "peak memory GiB")
    rows = [
        (
            part.part,
            str(part.batch_size),
            f"{part.gflop_per_image:,.1f}",
            f"{part.seconds:.2f}",
            f"{part.images_per_s:.3f}",
            f"{part.peak_share:.1%}",
            f"{part.peak_memory_bytes / 2**30:.2f}",
        )
        for part in measured.parts
    ]
    result(text_table(heads, rows))
