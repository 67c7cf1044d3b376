"""``v2flow bench [IMAGES]``: reconstruction of tokenizers, beside image codecs and published figures."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import typer

from v2flow_cli.cli import options
from v2flow_cli.cli.console import fail, log, log_left_out, progress, result, result_json

COMMANDS = ("train", "encode", "decode", "shard", "finetune-llm", "generate", "budget", "bench")
FIRST_ANSWERS = ("encode", "decode", "generate")


def reconstruction(
    images: options.Images = None,
    res: Annotated[
        str | None,
        typer.Option(metavar="PIXELS,...", help="Sides of the centre crop, as 256,512. Default: the model's."),
    ] = None,
    aspect: options.Aspect = "square",
    model: options.Tokenizers = None,
    external: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE:FACTORY", help="Your own tokenizer: Python code that builds it; repeatable."),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2",
            help="Measure at each value of tokens, refine, decoder, cfg, rounds, steps, solver, schedule, guidance or "
            "noise; several --sweep give every combination.",
        ),
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option(help="faithful or sharp, if a model has both. Default: both, a row each."),
    ] = None,
    cfg: Annotated[
        str | None,
        typer.Option(metavar="SCALE,...", help="Guidance scales; 1 means none. Default: the model's."),
    ] = None,
    rounds: options.Rounds = None,
    steps: options.Steps = None,
    solver: options.SolverName = None,
    schedule: options.Schedule = None,
    guidance: options.GuidanceKind = None,
    noise: options.Noise = None,
    refine: options.Refine = None,
    limit: options.Limit = None,
    batch_size: options.BatchSize = 8,
    report: options.Report = None,
    report_images: Annotated[
        int | None, typer.Option(min=0, help="Images shown on the page of --report. Default: 12.")
    ] = None,
    csv: options.Csv = None,
    images_csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the figures of every single image.")
    ] = None,
    lpips_net: Annotated[
        Literal["alex", "vgg", "squeeze"] | None,
        typer.Option(help="Backbone of LPIPS. Default: alex, left out if its weights are missing."),
    ] = None,
    fid: Annotated[
        bool | None, typer.Option("--fid/--no-fid", help="rFID. Default: if its weights are available.")
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Feature distances by SqueezeNet 1.1, VGG16 or AlexNet (.safetensors). Default: none.",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Weights of LPIPS and Inception, besides the torch hub cache."),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Download missing weights of LPIPS and Inception.")
    ] = False,
    codecs: Annotated[bool, typer.Option("--codecs/--no-codecs", help="JPEG, WebP, AVIF at the same bytes.")] = True,
    codec_bytes: Annotated[
        str | None, typer.Option(metavar="BYTES,...", help="More budgets for the codecs, as 224,448,896.")
    ] = None,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Images/s, memory, first answers.")] = True,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json_: options.Json = False,
) -> None:
    """Measure reconstruction (PSNR, SSIM, LPIPS, rFID), bits and speed, beside codecs at the same bytes.

    Examples:

        v2flow bench

        v2flow bench imgs/ --res 256,512 --report bench.html

        v2flow bench imgs/ --sweep cfg=1,2,3 --sweep solver=euler,heun --csv table.csv --no-speed
    """
    sizes: list[int | None] = [*options.numbers("--res", res, 16)] if res else [None]
    scales = options.numbers("--cfg", cfg, 0, float) if cfg else []
    fixed = options.sampling(
        cfg=scales[0] if len(scales) == 1 else None,
        rounds=rounds,
        steps=steps,
        solver=solver,
        schedule=schedule,
        guidance=guidance,
        noise=noise,
    )
    sweeps = [*(sweep or ()), *([f"cfg={cfg}"] if len(scales) > 1 else ())]
    ours = bool(model) or not external
    sampled = bool(sweeps or decoder or refine) or any(value is not None for value in fixed.values())
    options.only_with("decoder options", sampled, "a --model of ours beside --external", ours)
    options.only_with("--report-images", report_images is not None, "--report", report is not None)
    options.only_with("--codec-bytes", codec_bytes is not None, "--codecs", codecs)

    from v2flow_cli.bench.sweep import parse_sweeps
    from v2flow_cli.store.paths import check_writable

    check_writable((csv, images_csv, report))
    try:
        settings = parse_sweeps(sweeps, {**fixed, "decoder": decoder, "refine": refine})
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--sweep") from None

    from v2flow_cli.assets import sample_photos
    from v2flow_cli.bench.photos import PhotoReader

    reader = PhotoReader(images) if images else None
    samples = sample_photos() if reader is None else []
    total = len(samples) if reader is None else reader.count
    total = min(total, limit) if total is not None and limit is not None else total

    from v2flow_cli.bench.candidates import load_tokenizers
    from v2flow_cli.bench.codec_speed import first_answer_seconds, help_seconds
    from v2flow_cli.bench.coder import load_external
    from v2flow_cli.bench.networks import load_networks
    from v2flow_cli.bench.results import as_csv, as_record, help_text, tables
    from v2flow_cli.bench.results import images_csv as images_as_csv
    from v2flow_cli.bench.run import run_bench
    from v2flow_cli.runtime.device import pick_device, pick_dtype
    from v2flow_cli.runtime.processes import launch

    target = pick_device(device)
    externals = [load_external(name) for name in external or ()]
    models = load_tokenizers((model or [None]) if ours else [], target)
    networks = load_networks(target, lpips_net, fid, weights, download, features)
    benches = []
    with launch() as processes:
        for size in sizes:
            with progress(f"bench at {size} px" if size else "bench", total) as tick:
                benches.append(
                    run_bench(
                        models,
                        islice(reader if reader is not None else samples, limit),
                        size=size,
                        keep_aspect=aspect == "keep",
                        settings=settings,
                        externals=externals,
                        batch_size=batch_size,
                        dtype=pick_dtype(dtype, target),
                        seed=seed,
                        networks=networks,
                        with_codecs=codecs,
                        codec_bytes=options.numbers("--codec-bytes", codec_bytes, 1) if codec_bytes else (),
                        with_speed=speed,
                        keep=(12 if report_images is None else report_images) if report else 0,
                        ranks=processes,
                        tick=tick,
                    )
                )
        if processes.rank:
            return  # the first process reports for all
    seconds_of_help = help_seconds(COMMANDS) if speed else {}
    first_answers = first_answer_seconds(FIRST_ANSWERS) if speed else {}
    failed = reader.failed if reader is not None else []
    measured, notes = tables(benches), [note for bench in benches for note in bench.notes]

    options.write_to(csv, as_csv(measured).encode())
    options.write_to(images_csv, images_as_csv(benches).encode())
    if report:
        from v2flow_cli.bench.report.page import Page, write_report
        from v2flow_cli.bench.report.token_view import token_view

        page = Page(
            title="Reconstruction of photos from tokens",
            lead="Photos as tokens and back, measured on every photo, beside codecs with the same number of bytes.",
            tables=measured,
            benches=benches,
            views={name: token_view(tokenizer) for name, tokenizer in models.items()},
            command="v2flow bench",
            help_seconds=seconds_of_help,
            notes=notes,
            failed=[f"{f.name}: {f.reason}" for f in failed],
        )
        write_report(page, report)
    if json_:
        result_json(
            {
                **as_record(measured, notes),
                "help_seconds": seconds_of_help,
                "first_answer_seconds": first_answers,
                "report": str(report) if report else None,
                "csv": str(csv) if csv else None,
                "images_csv": str(images_csv) if images_csv else None,
                "failed": [{"source": f.name, "reason": f.reason} for f in failed],
                "not_taken": reader.not_taken.as_json() if reader is not None else [],
            }
        )
    else:
        from v2flow_cli.cli.bench_terminal import print_first_answers, print_tables

        print_tables(measured)
        if seconds_of_help:
            result(f"--help: {help_text(seconds_of_help)}")
        print_first_answers(first_answers)
        for file in filter(None, (report, csv, images_csv)):
            result(f"wrote {file}")
    for note in dict.fromkeys(notes):
        log(f"note: {note}")
    log_left_out(failed, reader.not_taken if reader is not None else None)
    if failed:
        fail(f"{len(failed)} of the images could not be measured; the figures are those of the others.")
