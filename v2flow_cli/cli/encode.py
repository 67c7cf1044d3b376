"""``v2flow encode``: images to token ids."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from v2flow_cli.cli import options
from v2flow_cli.cli.console import ERROR_BUDGET, fail, failures_json, log, log_left_out, progress, result, result_json
from v2flow_cli.cli.first_answer import without_collection


def encode(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Image files, folders (searched recursively), globs, or WebDataset tars.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the token files.", show_default=False)],
    model: options.Tokenizer = None,
    res: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the square, or of one of the same area, in pixels. Default: the model's."),
    ] = None,
    aspect: options.Aspect = "square",
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of each image: one of the tokenizer's lengths, or 1 to its maximum."),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(metavar="DB", help="Keep the fewest tokens that reach this PSNR in dB (flexible tokenizers)."),
    ] = None,
    refine: options.Refine = None,
    parquet: Annotated[
        bool, typer.Option("--parquet", help="Write the set as Parquet too: key, caption, tokens, height, width.")
    ] = False,
    batch_size: options.DeviceBatchSize = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that read and decode images. Default: one per CPU core.")
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    verify: Annotated[
        Literal["quick", "full"],
        typer.Option(help="quick: check the bytes that are read against the tars' manifest. full: all bytes first."),
    ] = "quick",
    error_budget: options.ErrorBudget = ERROR_BUDGET,
    max_minutes: Annotated[
        float, typer.Option(min=0, help="Begin no further tar after this time; a second run continues. 0: no limit.")
    ] = 0.0,
    force: options.Force = False,
    json_: options.Json = False,
) -> None:
    """Turn images into token ids: one .npy per image, or one per tar with its keys and captions beside it.

    Examples:

        v2flow encode imgs/ -o tokens/

        v2flow encode "imgs/*.jpg" -o tokens-512/ --res 512

        v2flow encode imgs/ -o tokens-whole/ --aspect keep

        v2flow encode shards/ -o shard-tokens/ --batch-size 32 --workers 4

        v2flow encode shards/ -o shard-tokens/ --parquet

        v2flow encode imgs/ -o tokens-32/ --model flexible --tokens 32

        v2flow encode imgs/ -o tokens-fast/ --model flexible --tokens 32 --refine 0

        v2flow encode imgs/ -o tokens-18db/ --model flexible --max-error 18

        torchrun --nproc-per-node 8 -m v2flow_cli.cli.app encode shards/ -o shard-tokens/
    """
    from v2flow_cli.errors import DataError
    from v2flow_cli.store.find import find_inputs
    from v2flow_cli.store.not_taken import NotTaken
    from v2flow_cli.store.paths import output_folder

    if parquet:
        from v2flow_cli.store.token_parquet import require_parquet

        require_parquet()
    if tokens is not None and max_error is not None:
        raise DataError("--tokens and --max-error: use one of them; --max-error chooses the number of tokens.")
    if refine and max_error is not None:
        raise DataError("--refine and --max-error: use one of them; ids are refined for one number of tokens.")
    out, not_taken = output_folder(out), NotTaken()
    sources = find_inputs(inputs, not_taken=not_taken, exclude=out)
    sources.check_one_kind(" ".join(inputs))
    tars = bool(sources.tars)
    if max_minutes and not tars:
        raise DataError("--max-minutes: only for tars; these are image files. Pack them with `v2flow shard`.")

    with without_collection():
        from v2flow_cli.jobs.encode import SetEncoder, encode_files, encode_shards
    from v2flow_cli.jobs.prefixes import Prefixes
    from v2flow_cli.runtime.device import pick_device, pick_dtype
    from v2flow_cli.runtime.processes import launch
    from v2flow_cli.store.failures import over_budget
    from v2flow_cli.tokenizer import V2FlowTokenizer

    files = sources.tars or sources.images
    target = pick_device(device)
    tokenizer = V2FlowTokenizer.from_pretrained(model).to(target)
    encoder = SetEncoder(
        tokenizer,
        image_size=res,
        batch_size=batch_size,
        workers=workers,
        dtype=pick_dtype(dtype, target),
        prefixes=Prefixes(tokens, max_error),
        keep_aspect=aspect == "keep",
        refine_steps=refine,
    )
    start = time.perf_counter()
    with launch() as ranks, progress("encode", None if tars else -(-len(files) // ranks.count)) as tick:
        if tars:
            report = encode_shards(
                encoder,
                files,
                out,
                force=force,
                tick=tick,
                verify=verify,
                ranks=ranks,
                max_minutes=max_minutes,
                not_taken=not_taken,
            )
        else:
            report = encode_files(encoder, files, out, force=force, tick=tick, ranks=ranks, not_taken=not_taken)
        if ranks.rank:
            return  # the first process reports for all
    tables = []
    if parquet:
        from v2flow_cli.store.token_parquet import write_parquet

        tables = write_parquet(out)
    histograms = []
    if max_error is not None:
        from v2flow_cli.jobs.lengths import inputs_of, length_histograms

        histograms = length_histograms(out, report.manifest, inputs_of(inputs, files))
    seconds = time.perf_counter() - start

    manifest = report.manifest
    mean_tokens = report.tokens / report.images if report.images else None
    if json_:
        result_json(
            {
                "output": str(out),
                "images": report.images,
                "files": report.files,
                "kept_files": report.kept_files,
                "image_size_px": list(manifest.image_size),
                "aspect": aspect,
                "tokens_per_image": manifest.tokens_per_image,
                "variable_length": manifest.variable_length,
                "mean_tokens_per_image": mean_tokens,
                "short_of_max_error": report.short,
                "refine_steps": manifest.refine_steps,
                "token_histograms": [dataclasses.asdict(histogram) for histogram in histograms],
                "codebook_size": manifest.codebook_size,
                "tokenizer_digest": manifest.tokenizer_digest,
                "parquet": [str(path) for path in tables],
                "seconds": seconds,
                "without_caption": report.images - report.captioned,
                "failed": failures_json(report.failures),
                "not_taken": report.not_taken.as_json(),
            }
        )
    else:
        length = str(manifest.tokens_per_image)
        if manifest.variable_length:
            length = f"1 to {length}" + (f" (mean {mean_tokens:.1f})" if mean_tokens else "")
        kept = f", {report.kept_files} finished earlier" if report.kept_files else ""
        result(
            f"{out}: {report.images} images in {report.files} files{kept}; "
            f"{length} tokens an image, ids below {manifest.codebook_size:,}"
            + (f", refined in {manifest.refine_steps} steps" if manifest.refine_steps else "")
        )
        for path in tables:
            result(str(path))
    if report.later:
        log(f"time limit: {report.later} tars are left; repeat the command to continue")
    for line in (line for histogram in histograms for line in histogram.lines()):
        log(line)
    if report.short:
        log(f"{report.short} images have less than {max_error:g} dB even with all their tokens")
    log_left_out(report.failures, report.not_taken)
    if 0 < report.captioned < report.images:
        log(f"{report.images - report.captioned:,} of {report.images:,} images have no caption")
    if over_budget(report.failures, report.good, error_budget):
        fail(
            f"{len(report.failures)} of the inputs could not be encoded, which exceeds the error budget of "
            f"{error_budget:.2%}; the others are in {out}."
        )
    if not report.good:
        fail(f"{out}: no image was encoded.")
