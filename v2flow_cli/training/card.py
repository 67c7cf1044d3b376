"""The model card that ``train`` leaves in the output folder: what was run, on what, for how long."""

from __future__ import annotations

from v2flow_cli.recipe import AutoencoderRecipe, TokenizerRecipe
from v2flow_cli.recipe.schema import Registers
from v2flow_cli.runtime.device import describe_hardware


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
    """Markdown with the facts of a run; figures on held-out photos are for ``v2flow bench`` to add."""
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
    else:
        title = "An image autoencoder"
        what = f"{recipe.model.latent_channels} latent channels at 1/8 resolution, for v2flow tokenizers."
        use = "v2flow train recipes/default/tokenizer.yaml --set latents.autoencoder=FOLDER"
    losses = ", ".join(f"{name.removeprefix('train/')} {value:.4g}" for name, value in metrics.items())
    rows = {
        "data": ", ".join(recipe.data.sources),
        "training": f"{steps:,} steps of {recipe.train.batch_size} crops of {recipe.data.crop_size} px "
        f"({images:,} crops)",
        "hardware, wall time": f"{processes} process(es) on {describe_hardware()}, {precision}, "
        f"{seconds / 60:.1f} minutes",
        "last logged means": losses or "none",
        "made by": "`v2flow train` with `recipe.yaml` in this folder",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    head = "---\nlibrary_name: v2flow\ntags: [v2flow]\n---\n"
    return f"{head}\n# {title}\n\n{what}\n\n    {use}\n\n| | |\n|---|---|\n{table}\n"
