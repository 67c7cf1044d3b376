"""``v2flow bench``: what tokenizers keep of a picture, beside plain codecs and the published table.

What measures something else than photos is a mode: one option below, among those after ``codecs``, and one function
in a file of its own (``cli/bench_NAME.py``), called before the photos are looked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from v2flow_cli.cli.console import fail, log, progress, result, result_json
from v2flow_cli.cli.decode import Guidance, Schedule, Solver

if TYPE_CHECKING:
    import torch

    from v2flow_cli.bench.evaluate import Judges
    from v2flow_cli.tokenizer import V2FlowTokenizer

COMMANDS = ("train", "encode", "decode", "shard", "finetune-llm", "generate", "bench")
T = TypeVar("T")
N = TypeVar("N", int, float)


class LpipsNet(str, Enum):
    alex = "alex"
    vgg = "vgg"
    squeeze = "squeeze"


def bench(
    images: Annotated[
        list[str] | None,
        typer.Argument(help="Image files, folders, globs or WebDataset tars. Default: five sample photos."),
    ] = None,
    res: Annotated[
        str | None,
        typer.Option(metavar="PIXELS,...", help="Sides of the centre crop, as 256,512. Default: the model's."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Tokenizer: folder or hub id; may be repeated. Default: the one inside the package."),
    ] = None,
    external: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE:FACTORY",
            help="A tokenizer that is not ours: your Python code that makes it. May be repeated.",
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2",
            help="Measure at each value of tokens, decoder, cfg, rounds, steps, solver, schedule, guidance or noise; "
            "several --sweep give every combination.",
        ),
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option(help="faithful or sharp, where a model has both. Default: both, a row each."),
    ] = None,
    cfg: Annotated[
        str | None,
        typer.Option(metavar="SCALE,...", help="Guidance scales; 1 means none. Default: the model's."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Unmasking rounds. Default: the model's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="ODE steps in each round. Default: the model's.")] = None,
    solver: Annotated[Solver | None, typer.Option(help="Default: the model's.")] = None,
    schedule: Annotated[Schedule | None, typer.Option(help="Guidance over the rounds. Default: the model's.")] = None,
    guidance: Annotated[
        Guidance | None, typer.Option(help="Of which kind --cfg is: cfg or apg. Default: the model's.")
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(min=0.0, help="Factor on the initial noise; 0 is the mean. Default: the model's."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after this many images.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 8,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a page that shows it all.")] = None,
    report_images: Annotated[int, typer.Option(min=0, help="Images shown on the page.")] = 12,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table: one line a system.")] = None,
    images_csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the figures of every single image.")
    ] = None,
    lpips_net: Annotated[
        LpipsNet | None, typer.Option(help="Backbone of LPIPS. Default: alex, left out where it is missing.")
    ] = None,
    fid: Annotated[
        bool | None, typer.Option("--fid/--no-fid", help="rFID. Default: where the weights are at hand.")
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where weights of LPIPS and Inception lie beside the torch hub cache."),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch weights of LPIPS and Inception where they are missing.")
    ] = False,
    codecs: Annotated[bool, typer.Option("--codecs/--no-codecs", help="JPEG, WebP, AVIF at the same bytes.")] = True,
    codec_bytes: Annotated[
        str | None, typer.Option(metavar="BYTES,...", help="More budgets for the codecs, as 224,448,896.")
    ] = None,
    llm: Annotated[
        bool, typer.Option("--llm", help="Measure how well an LLM draws; IMAGES are captioned, or their tokens.")
    ] = False,
    llm_model: Annotated[
        str | None, typer.Option(help="LLM of --llm: folder or hub id. Default: the one inside the package.")
    ] = None,
    alignment: Annotated[
        bool, typer.Option("--alignment", help="Measure how visual tokens lie among the LLM's words (Figure 1b).")
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the plane of --alignment.")] = None,
    speed: Annotated[
        bool,
        typer.Option("--speed/--no-speed", help="Images/s, memory, time of --help; of a RECIPE.yaml: its cost."),
    ] = True,
    batches: Annotated[str, typer.Option(metavar="N,...", help="Of a recipe's speed: the batch sizes.")] = "1,4,16",
    repeats: Annotated[int, typer.Option(min=1, help="Of a recipe's speed: timed passes; the median counts.")] = 1,
    autoencoder: Annotated[
        bool, typer.Option("--autoencoder", help="Of a recipe's speed: time its autoencoder too.")
    ] = False,
    join: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE.json", help="Measure nothing: one table of results that --json printed."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise; each image's own is drawn from it and its name.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (bf16 where it is fast), fp32 or bf16.")] = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure reconstruction (PSNR, SSIM, LPIPS, rFID), bits and speed, beside codecs at the same bytes.

    Examples:

        v2flow bench

        v2flow bench imgs/ --res 256,512 --report bench.html

        v2flow bench imgs/ --sweep cfg=1,2,3 --sweep solver=euler,heun --csv table.csv --no-speed

        v2flow bench --join first.json --join second.json

        v2flow bench captioned/ --llm

        v2flow bench imgs/ --alignment --plot alignment.png

        v2flow bench --speed recipes/paper/512px-256.yaml --batches 1,4
    """
    # Modes: `if NAME: return measure_name(...)`, each imported from its own file here.
    if llm:
        from v2flow_cli.cli.bench_llm import bench_llm

        first = model[0] if model else None
        return bench_llm(
            images,
            llm_model=llm_model,
            model=first,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            device=device,
            dtype=dtype,
            json_=json_,
        )
    if alignment:
        from v2flow_cli.cli.bench_alignment import bench_alignment

        return bench_alignment(
            images, models=model or [], plot=plot, limit=limit, seed=seed, device=device, json_=json_
        )
    if join:
        from v2flow_cli.cli.bench_join import join_results

        return join_results(join, csv=csv, report=report, json_=json_)

    sizes: list[int | None] = [*_numbers("--res", res, 16)] if res else [None]
    budgets = _numbers("--codec-bytes", codec_bytes, 1) if codec_bytes else ()
    scales = _numbers("--cfg", cfg, 0, float) if cfg else []
    swept = [*(sweep or ()), *([f"cfg={cfg}"] if len(scales) > 1 else ())]
    fixed = {
        "guidance_scale": scales[0] if len(scales) == 1 else None,
        "num_mask_steps": rounds,
        "num_flow_steps": steps,
        "solver": solver.value if solver else None,
        "guidance_schedule": schedule.value if schedule else None,
        "guidance": guidance.value if guidance else None,
        "noise_temperature": noise,
    }
    if speed and images and images[0].endswith((".yaml", ".yml")):
        from v2flow_cli.cli.bench_speed import bench_speed

        counts = _numbers("--batches", batches, 1)
        plumbing: dict[str, Any] = {"repeats": repeats, "autoencoder": autoencoder, "json_": json_}
        plumbing |= {"device": device, "dtype": dtype}
        return bench_speed(images, batch_sizes=counts, size=sizes[0], settings=fixed, **plumbing)

    from v2flow_cli.bench.sweep import parse_sweeps

    try:
        settings = parse_sweeps(swept, {**fixed, "decoder": decoder})
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--sweep") from None

    from v2flow_cli.assets import sample_photos
    from v2flow_cli.bench.photos import PhotoReader

    reader = PhotoReader(images) if images else None
    samples = sample_photos() if reader is None else []
    total = len(samples) if reader is None else reader.count
    total = min(total, limit) if total is not None and limit is not None else total

    from v2flow_cli.bench.codec_speed import help_seconds
    from v2flow_cli.bench.coder import load_external
    from v2flow_cli.bench.results import as_csv, as_record, tables
    from v2flow_cli.bench.results import images_csv as images_as_csv
    from v2flow_cli.bench.run import run_bench
    from v2flow_cli.runtime.device import pick_device, pick_dtype
    from v2flow_cli.runtime.processes import launch
    from v2flow_cli.store.files import write_bytes

    target = pick_device(device)
    externals = [load_external(place) for place in external or ()]
    models = _load_models(model if model or external else [None], target)
    judges = load_judges(target, lpips_net, fid, weights, download)
    benches = []
    with launch() as ranks:
        for size in sizes:
            with progress(f"bench at {size} px" if size else "bench", total) as tick:
                benches.append(
                    run_bench(
                        models,
                        islice(reader if reader is not None else samples, limit),
                        size=size,
                        settings=settings,
                        externals=externals,
                        batch_size=batch_size,
                        dtype=pick_dtype(dtype, target),
                        seed=seed,
                        judges=judges,
                        with_codecs=codecs,
                        codec_bytes=budgets,
                        with_speed=speed,
                        keep=report_images if report else 0,
                        ranks=ranks,
                        tick=tick,
                    )
                )
        if ranks.rank:
            return  # the first one speaks for all
    waits = help_seconds(COMMANDS) if speed else {}
    failed = reader.failed if reader is not None else []
    found, notes = tables(benches), [note for bench in benches for note in bench.notes]

    if csv:
        write_bytes(csv, as_csv(found).encode())
    if images_csv:
        write_bytes(images_csv, images_as_csv(benches).encode())
    if report:
        from v2flow_cli.bench.report.page import Page, write_report
        from v2flow_cli.bench.report.token_view import token_views

        page = Page(
            title="What tokens keep of a photo",
            lead="Photos as tokens and back, measured on every photo, beside codecs that get as many bytes.",
            tables=found,
            benches=benches,
            views=token_views(models),
            command="v2flow bench",
            help_seconds=waits,
            notes=notes,
            failed=[f"{f.source}: {f.reason}" for f in failed],
        )
        write_report(page, report)
    if json_:
        result_json(
            {
                **as_record(found, notes),
                "help_seconds": waits,
                "report": str(report) if report else None,
                "csv": str(csv) if csv else None,
                "images_csv": str(images_csv) if images_csv else None,
                "failed": [{"source": f.source, "reason": f.reason} for f in failed],
            }
        )
    else:
        from v2flow_cli.cli.bench_tables import print_tables, print_waits

        print_tables(found)
        print_waits(waits)
        for file in filter(None, (report, csv, images_csv)):
            result(f"wrote {file}")
    for note in dict.fromkeys(notes):
        log(f"note: {note}")
    for failure in failed:
        log(f"left out: {failure.source}: {failure.reason}")
    if failed:
        fail(f"{len(failed)} of the images could not be measured; the figures are of the other ones.")


def _numbers(option: str, text: str, least: float, kind: type[N] = int) -> list[N]:  # type: ignore[assignment]
    """Different numbers between commas, from ``least`` on."""
    try:
        values: list[N] = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(least <= value < 1_000_000 for value in values) or len({*values}) < len(values):
        raise typer.BadParameter(f"{text}: expected different numbers from {least} on, with commas", param_hint=option)
    return values


def _load_models(places: Sequence[str | None] | None, device: torch.device) -> dict[str, V2FlowTokenizer]:
    """Tokenizers by a short name: ``v2flow`` for one alone, else as much of each place's end as tells them apart."""
    from v2flow_cli.tokenizer import V2FlowTokenizer

    places = list(dict.fromkeys(places or ()))
    names = ["v2flow"] * len(places)
    if len(places) > 1:
        parts = [Path(place).parts if place else ("v2flow",) for place in places]
        depth = next(d for d in range(1, 99) if len({p[-d:] for p in parts}) == len(parts))
        names = ["/".join(p[-depth:]) for p in parts]
    return {name: V2FlowTokenizer.from_pretrained(place).to(device) for name, place in zip(names, places)}


def load_judges(
    device: torch.device,
    net: LpipsNet | None = None,
    fid: bool | None = None,
    folder: Path | None = None,
    download: bool = False,
) -> Judges:
    """LPIPS and Inception.  What was asked for by name and is missing is an error; else it is a note."""
    from v2flow_cli.bench.evaluate import Judges
    from v2flow_cli.bench.perceptual import Inception, Lpips
    from v2flow_cli.errors import ModelError
    from v2flow_cli.store.network_weights import JudgeWeights

    weights, notes = JudgeWeights(folder, download), []

    def load(make: Callable[[], T], asked: bool) -> T | None:
        try:
            return make()
        except ModelError as error:
            if asked or download:
                raise
            notes.append(f"left out: {error}")
            return None

    lpips = load(lambda: Lpips(net.value if net else "alex", weights, device), net is not None)
    inception = None if fid is False else load(lambda: Inception(weights, device), fid is True)
    return Judges(lpips, inception, tuple(notes))
