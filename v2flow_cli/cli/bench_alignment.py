"""``v2flow bench alignment``: visual tokens among the words of the LLM (Figure 1b)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from v2flow_cli.cli import options
from v2flow_cli.cli.console import fail, log_left_out, result, result_json


def alignment(
    images: options.Images = None,
    model: options.Tokenizers = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Plot both on the plane of their principal components.")
    ] = None,
    limit: options.Limit = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of words and tokens.")] = 0,
    device: options.Device = "auto",
    json_: options.Json = False,
) -> None:
    """Measure the distances of visual tokens to the words of the LLM whose vocabulary the first tokenizer uses.

    Examples:

        v2flow bench alignment imgs/ --plot alignment.png

        v2flow bench alignment imgs/ --model runs/mine --model runs/no-vocabulary
    """
    from itertools import islice

    from v2flow_cli.assets import sample_photos
    from v2flow_cli.bench.alignment import align, draw_planes, photo_tokens, word_table
    from v2flow_cli.bench.photos import PhotoReader
    from v2flow_cli.runtime.device import pick_device
    from v2flow_cli.store.images import png_bytes
    from v2flow_cli.store.paths import check_writable
    from v2flow_cli.tokenizer import V2FlowTokenizer

    check_writable([plot])
    target = pick_device(device)
    alignments, failed, words, reader = [], [], None, None
    for name in model or (None,):
        tokenizer = V2FlowTokenizer.from_pretrained(name).to(target)
        words = word_table(tokenizer) if words is None else words
        reader = PhotoReader(images) if images else None
        photos = islice(reader if reader is not None else sample_photos(), limit)
        label = "embedded model" if name is None else name
        tokens = photo_tokens(tokenizer, photos, words, label)
        alignments.append(align(label, tokenizer.vocabulary is not None, tokens, words, seed))
        failed = reader.failed if reader is not None else []
    word_count = 0 if words is None else len(words)
    if plot:
        options.write_to(plot, png_bytes(draw_planes(alignments)))
    if json_:
        rows = [{k: v for k, v in one.__dict__.items() if not k.endswith("_plane")} for one in alignments]
        result_json({"alignments": rows, "words": word_count, "plot": str(plot) if plot else None})
    else:
        for one in alignments:
            result(
                f"{one.name} ({'with' if one.has_vocabulary else 'without'} vocabulary): {one.tokens:,} visual tokens, "
                f"{word_count:,} words\n"
                f"  norm ratio {one.norm_ratio:.3f}; nearest word at cosine {one.nearest_word_cosine:.3f} "
                f"(a word's own nearest: {one.word_nearest_cosine:.3f}); energy distance {one.energy_distance:.3f}"
            )
        if plot:
            result(f"wrote {plot}")
    log_left_out(failed, reader.not_taken if reader is not None else None)
    if failed:
        fail(f"{len(failed)} of the images could not be read; the figures are those of the others.")
