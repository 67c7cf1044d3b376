"""``v2flow bench --llm``: how well an LLM draws what captions say."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from v2flow_cli.cli.console import progress, result, result_json
from v2flow_cli.errors import DataError


def bench_llm(
    sources: Sequence[str] | None,
    *,
    llm_model: str | None,
    model: str | None,
    limit: int | None,
    batch_size: int,
    seed: int,
    device: str,
    dtype: str,
    json_: bool,
) -> None:
    """Print the figures of one LLM on captioned photos, or on their tokens."""
    if not sources:
        raise DataError("bench --llm needs captioned photos: a folder, WebDataset tars, or what `v2flow encode` wrote.")

    from v2flow_cli.bench.llm import measure_llm, read_captioned
    from v2flow_cli.jobs.generate import check_pair
    from v2flow_cli.llm.sample import DrawingLM
    from v2flow_cli.runtime.device import pick_device, pick_dtype
    from v2flow_cli.tokenizer import V2FlowTokenizer

    target = pick_device(device)
    tokenizer = V2FlowTokenizer.from_pretrained(model).to(target)
    llm = DrawingLM.from_pretrained(llm_model, target, pick_dtype(dtype, target))
    check_pair(llm, tokenizer)
    with progress("read", None) as tick:
        pairs = read_captioned(sources, tokenizer, llm.vocabulary.tokens_per_image, limit, tick)
    with progress("bench --llm", 3 * len(pairs)) as tick:
        found = measure_llm(llm, pairs, batch_size=batch_size, seed=seed, tick=tick)
    if json_:
        result_json(dataclasses.asdict(found) | {"llm_digest": llm.digest, "tokenizer_digest": tokenizer.token_digest})
        return
    trained = found.unigram_trained
    result(
        f"{found.photos:,} photos, {found.tokens:,} visual tokens of {llm.vocabulary.codebook_size:,} codes\n"
        f"likelier under their own caption than under another photo's: {found.matched_share:.1%} "
        f"± {found.matched_ci95:.1%} (chance: 50%)\n"
        f"visual loss: {found.visual_loss:.3f} nats a token under their own caption, "
        f"{found.other_caption_loss:.3f} under another's, {found.no_caption_loss:.3f} under none\n"
        f"beside it: {found.ln_codebook_size:.3f} for a uniform guess (ln K), "
        + (f"{trained:.3f} for a unigram of the training set, " if trained is not None else "")
        + f"{found.unigram_entropy:.3f} for a unigram of these very photos"
    )
