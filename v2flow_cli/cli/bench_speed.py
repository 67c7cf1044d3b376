"""``v2flow bench --speed RECIPE.yaml``: what a tokenizer of that size costs, before it is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from v2flow_cli.cli.console import is_main_process, log, result, result_json

if TYPE_CHECKING:
    from v2flow_cli.bench.recipe_cost import RecipeSpeed


def bench_speed(
    recipes: Sequence[str],
    *,
    batch_sizes: Sequence[int],
    size: int | None,
    repeats: int,
    autoencoder: bool,
    device: str,
    dtype: str,
    json_: bool,
    settings: Mapping[str, Any],
) -> None:
    """Print FLOPs, images a second, share of the matmul peak and memory of one recipe's tokenizer."""
    if len(recipes) > 1:
        raise typer.BadParameter("one recipe at a time", param_hint="IMAGES")

    from v2flow_cli.bench.recipe_cost import measure_recipe
    from v2flow_cli.recipe import load_recipe
    from v2flow_cli.recipe.schema import TokenizerRecipe
    from v2flow_cli.runtime.device import pick_device, pick_dtype

    recipe = load_recipe(Path(recipes[0]), kinds=("tokenizer",))
    assert isinstance(recipe, TokenizerRecipe)
    target = pick_device(device)
    found = measure_recipe(
        recipe,
        batch_sizes=batch_sizes,
        size=size,
        repeats=repeats,
        autoencoder=autoencoder,
        device=target,
        dtype=pick_dtype(dtype, target),
        **settings,
    )
    if json_:
        result_json({"recipe": recipes[0], **dataclasses.asdict(found)})
    else:
        _print(recipes[0], found)
    for note in found.notes:
        log(note)


def _print(name: str, found: RecipeSpeed) -> None:
    if not is_main_process():
        return
    import sys

    from rich import box
    from rich.console import Console
    from rich.table import Table

    settings = ", ".join(f"{key} {value}" for key, value in found.settings.items() if value is not None)
    result(
        f"{name}: {found.image_size} px, {found.tokens:,} tokens, {found.patches:,} patches, "
        f"{found.parameters / 1e6:,.0f}M parameters, random weights"
    )
    result(f"decode with {settings}")
    result(
        f"{found.device}, {found.dtype}, {found.threads} threads; matmul peak of this run "
        f"{found.matmul_peak_gflop_per_s:,.0f} GFLOP/s"
    )
    heads = ("part", "batch", "GFLOP/image", "s", "images/s", "of matmul peak", "peak memory GiB")
    table = Table(box=box.SIMPLE_HEAD)
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", no_wrap=True)
    for part in found.parts:
        table.add_row(
            part.part,
            str(part.batch_size),
            f"{part.gflop_per_image:,.1f}",
            f"{part.seconds:.2f}",
            f"{part.images_per_s:.3f}",
            f"{part.peak_share:.1%}",
            f"{part.peak_memory_bytes / 2**30:.2f}",
        )
    Console(width=None if sys.stdout.isatty() else 100, highlight=False).print(table)
