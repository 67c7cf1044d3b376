"""``v2flow bench llm``: whether an LLM's images follow their captions."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from v2flow_cli.cli import options
from v2flow_cli.cli.console import log, progress, result, result_json


def llm(
    sources: Annotated[
        list[str],
        typer.Argument(help="Captioned photos: folders or WebDataset tars; or their tokens."),
    ],
    llm_model: options.Llm = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Image tokenizer: folder or hub id. Default: the one inside the package."),
    ] = None,
    limit: options.Limit = None,
    batch_size: options.BatchSize = 8,
    seed: Annotated[int, typer.Option(help="Seed of the other caption for each photo.")] = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json_: options.Json = False,
) -> None:
    """Measure whether captions make their own images more likely, and the loss in nats a visual token.

    Examples:

        v2flow bench llm captioned/

        v2flow bench llm captioned/ --llm-model runs/my-llm --limit 200
    """
    if model and len(model) > 1:
        raise typer.BadParameter(f"{len(model)} tokenizers; an LLM draws the tokens of one.", param_hint="--model")

    from v2flow_cli.bench.llm import measure_llm, read_captioned
    from v2flow_cli.jobs.generate import load_models
    from v2flow_cli.store.not_taken import NotTaken

    not_taken = NotTaken()
    tokenizer, drawing_lm, _ = load_models(model[0] if model else None, llm_model, device, dtype, option="--model")
    with progress("read", None) as tick:
        length = drawing_lm.vocabulary.tokens_per_image
        pairs = read_captioned(sources, tokenizer, length, limit, tick, not_taken)
    not_taken.log(log)
    with progress("bench llm", 3 * len(pairs)) as tick:
        figures = measure_llm(drawing_lm, pairs, batch_size=batch_size, seed=seed, tick=tick)
    if json_:
        digests = {"llm_digest": drawing_lm.digest, "tokenizer_digest": tokenizer.token_digest}
        result_json(dataclasses.asdict(figures) | digests | {"not_taken": not_taken.as_json()})
        return
    unigram = figures.unigram_trained
    codes = drawing_lm.vocabulary.codebook_size
    result(
        f"{figures.photos:,} photos, {figures.tokens:,} visual tokens of {codes:,} codes\n"
        f"more likely under their own caption than under another photo's: {figures.matched_share:.1%} "
        f"± {figures.matched_ci95:.1%} (chance: 50%)\n"
        f"visual loss: {figures.visual_loss:.3f} nats a token under their own caption, "
        f"{figures.other_caption_loss:.3f} under another's, {figures.no_caption_loss:.3f} under none\n"
        f"for comparison: {figures.ln_codebook_size:.3f} for a uniform guess (ln K), "
        + (f"{unigram:.3f} for a unigram of the training set, " if unigram is not None else "")
        + f"{figures.unigram_entropy:.3f} for a unigram of these photos"
    )
