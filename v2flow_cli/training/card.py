"""Model cards: the hub's front matter, and for ``train`` the facts of the run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from v2flow_cli.recipe import AutoencoderRecipe, TokenizerRecipe
from v2flow_cli.recipe.schema import Card, Registers
from v2flow_cli.runtime.device import describe_hardware
from v2flow_cli.runtime.hub import may_be_hub_id


def front_matter(
    facts: Card,
    output: str,
    *,
    library: str,
    task: str,
    base_models: Iterable[str],
    data: Iterable[str],
    metrics: Mapping[str, float],
    split: str,
) -> str:
    """The YAML at the top of a model card: licence, library, task, data sets, base models, metrics as model-index.

    Args:    output, folder of the model, whose name the model gets; library and task, the hub's names; base_models, of
             which only hub ids are listed; data, sources of the metrics, and their split, "train" or "validation".
    """
    names = ", ".join(map(source_name, data))
    results = [
        EvalResult(
            task_type=task,
            dataset_type=facts.datasets[0] if facts.datasets else "custom",
            dataset_name=names,
            dataset_split=split,
            metric_type=name,
            metric_value=round(value, 4),
        )
        for name, value in metrics.items()
        if math.isfinite(value)
    ]
    hub_ids = [name for name in dict.fromkeys(base_models) if "/" in name and may_be_hub_id(name)]
    card = ModelCardData(
        license=facts.license,
        library_name=library,
        pipeline_tag=task,
        tags=["v2flow"],
        datasets=list(facts.datasets) or None,
        base_model=hub_ids or None,
        model_name=Path(output).name if results else None,
        eval_results=results or None,
    )
    return f"---\n{card.to_yaml()}\n---\n"


def source_name(source: str) -> str:
    """The name of a data source on a card: only the last part of an absolute path."""
    return Path(source).name if Path(source).is_absolute() else source


def write_card(
    recipe: AutoencoderRecipe | TokenizerRecipe,
    *,
    steps: int,
    images: int,
    seconds: float,
    processes: int,
    precision: str,
    metrics: dict[str, float],
) -> str:
    """Markdown with the facts of a run; ``v2flow bench`` measures figures on held-out photos."""
    base_models: tuple[str, ...]
    if isinstance(recipe, TokenizerRecipe):
        title = "A V2Flow image tokenizer"
        resampler, words = recipe.resampler, recipe.vocabulary.llm
        count = str(resampler.max_tokens if isinstance(resampler, Registers) else resampler.tokens_per_256px)
        if isinstance(resampler, Registers) and resampler.nested_dropout != "none":
            count = f"1 to {count}"
        space = "" if words == "none" else f"in the vocabulary space of `{words}`, "
        what = (
            f"{count} tokens of {recipe.quantizer.codebook_size:,} codes for a 256 px image, {space}on the latents "
            f"of `{recipe.latents.autoencoder}`."
        )
        use = "v2flow encode imgs/ -o tokens/ --model FOLDER"
        task, base_models = "image-feature-extraction", (recipe.latents.autoencoder, words, recipe.init_from)
    else:
        title = "An image autoencoder"
        what = f"{recipe.model.latent_channels} latent channels at 1/8 resolution, for v2flow tokenizers."
        use = "v2flow train recipes/default/tokenizer.yaml --set latents.autoencoder=FOLDER"
        task, base_models = "image-to-image", ()
    metrics = {name.removeprefix("train/"): value for name, value in metrics.items()}
    losses = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    rows = {
        "data": ", ".join(map(source_name, recipe.data.sources)),
        "training": f"{steps:,} steps of {recipe.train.batch_size} crops of {recipe.data.crop_size} px "
        f"({images:,} crops)",
        "hardware, wall time": f"{processes} process(es) on {describe_hardware()}, {precision}, "
        f"{seconds / 60:.1f} minutes",
        "last logged means": losses or "none",
        "trained by": "`v2flow train` with `recipe.yaml` in this folder",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    head = front_matter(
        recipe.card,
        recipe.output,
        library="v2flow",
        task=task,
        base_models=base_models,
        data=recipe.data.sources,
        metrics={name: value for name, value in metrics.items() if name != "grad_norm"},
        split="train",
    )
    return f"{head}\n# {title}\n\n{what}\n\n    {use}\n\n| | |\n|---|---|\n{table}\n"
