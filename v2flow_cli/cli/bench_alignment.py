"""``v2flow bench --alignment``: visual tokens among the words of the LLM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from v2flow_cli.cli.console import fail, log, result, result_json


def bench_alignment(
    images: Sequence[str] | None,
    *,
    models: Sequence[str],
    plot: Path | None,
    limit: int | None,
    seed: int,
    device: str,
    json_: bool,
) -> None:
    """Print how the visual tokens of ``models`` lie among the words that the first of them mixes."""
    import io
    from itertools import islice

    from v2flow_cli.assets import sample_photos
    from v2flow_cli.bench.alignment import align, draw_planes, photo_tokens, word_table
    from v2flow_cli.bench.photos import PhotoReader
    from v2flow_cli.runtime.device import pick_device
    from v2flow_cli.store.files import write_bytes
    from v2flow_cli.tokenizer import V2FlowTokenizer

    target = pick_device(device)
    found, failed, words = [], [], None
    for name in models or (None,):
        tokenizer = V2FlowTokenizer.from_pretrained(name).to(target)
        words = word_table(tokenizer) if words is None else words
        reader = PhotoReader(images) if images else None
        photos = islice(reader if reader is not None else sample_photos(), limit)
        shown = "embedded model" if name is None else name
        tokens = photo_tokens(tokenizer, photos, words, shown)
        found.append(align(shown, tokenizer.vocabulary is not None, tokens, words, seed))
        failed = reader.failed if reader is not None else []
    word_count = 0 if words is None else len(words)
    if plot:
        buffer = io.BytesIO()
        draw_planes(found).save(buffer, "PNG")
        write_bytes(plot, buffer.getvalue())
    if json_:
        rows = [{k: v for k, v in one.__dict__.items() if not k.endswith("_plane")} for one in found]
        result_json({"alignments": rows, "words": word_count, "plot": str(plot) if plot else None})
    else:
        for one in found:
            result(
                f"{one.name} ({'with' if one.has_vocabulary else 'without'} vocabulary): {one.tokens:,} visual tokens, "
                f"{word_count:,} words\n"
                f"  norm ratio {one.norm_ratio:.3f}; nearest word at cosine {one.nearest_word_cosine:.3f} "
                f"(a word's own nearest: {one.word_nearest_cosine:.3f}); energy distance {one.energy_distance:.3f}"
            )
        if plot:
            result(f"wrote {plot}")
    for failure in failed:
        log(f"left out: {failure.source}: {failure.reason}")
    if failed:
        fail(f"{len(failed)} of the images could not be read; the figures are of the other ones.")
