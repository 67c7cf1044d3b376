"""``v2flow bench``: what the tokenizer keeps of a picture, beside plain codecs and the published table.

What measures something else than photos is a mode: one option below, among those after ``codecs``, and one function
in a file of its own (``cli/bench_NAME.py``), called before the photos are looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from v2flow_cli.cli.console import fail, log, progress, result, result_json
from v2flow_cli.cli.decode import Schedule, Solver

if TYPE_CHECKING:
    from PIL import Image


COMMANDS = ("train", "encode", "decode", "shard", "finetune-llm", "generate", "bench")


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
        int | None,
        typer.Option(min=16, help="Side of the centre crop in pixels, 256 or 512. Default: the model's."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Tokenizer: folder or hub id. Default: the one inside the package.")
    ] = None,
    cfg: Annotated[
        str | None,
        typer.Option(metavar="SCALE,...", help="Guidance scales; 1 means none. Default: the model's."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Unmasking rounds. Default: the model's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="ODE steps in each round. Default: the model's.")] = None,
    solver: Annotated[Solver | None, typer.Option(help="Default: the model's.")] = None,
    schedule: Annotated[Schedule | None, typer.Option(help="Guidance over the rounds. Default: the model's.")] = None,
    noise: Annotated[
        float | None,
        typer.Option(min=0.0, help="Factor on the initial noise; 0 is the mean. Default: the model's."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after this many images.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 8,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a page that shows it all.")] = None,
    report_images: Annotated[int, typer.Option(min=0, help="Images shown on the page.")] = 12,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures of every single image.")] = None,
    lpips_net: Annotated[LpipsNet, typer.Option(help="Backbone of LPIPS.")] = LpipsNet.alex,
    lpips_download: Annotated[
        bool, typer.Option("--lpips-download", help="Fetch the backbone where the torch hub cache lacks it.")
    ] = False,
    codecs: Annotated[bool, typer.Option("--codecs/--no-codecs", help="JPEG, WebP, AVIF at the same bytes.")] = True,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Images/s, memory, and time of --help.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the noise; each image's own is drawn from it and its name.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (bf16 where it is fast), fp32 or bf16.")] = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure reconstruction (PSNR, SSIM, LPIPS), codebook usage and speed, beside codecs at the same bytes.

    Examples:

        v2flow bench

        v2flow bench imgs/ --res 512 --report bench.html

        v2flow bench imgs/ --cfg 1,3 --csv figures.csv --no-speed
    """
    # Modes: `if NAME: return measure_name(...)`, each imported from its own file here.
    scales = _scales(cfg)

    from itertools import islice

    from v2flow_cli.bench.photos import PhotoReader

    reader = PhotoReader(images) if images else None
    photos = islice(reader if reader is not None else _sample_photos(), limit)
    total = reader.count if reader is not None else None
    total = min(total, limit) if total is not None and limit is not None else total

    from v2flow_cli.bench.run import as_csv, as_record, run_bench
    from v2flow_cli.bench.throughput import help_seconds
    from v2flow_cli.store.files import write_bytes
    from v2flow_cli.tokenizer import V2FlowTokenizer
    from v2flow_cli.tokenizer.hardware import pick_device, pick_dtype

    target = pick_device(device)
    tokenizer = V2FlowTokenizer.from_pretrained(model).to(target)
    lpips, lpips_note = _lpips(lpips_net.value, lpips_download, target)
    with progress("bench", total) as tick:
        found = run_bench(
            tokenizer,
            photos,
            size=res,
            guidance_scales=scales,
            batch_size=batch_size,
            dtype=pick_dtype(dtype, target),
            seed=seed,
            lpips=lpips,
            lpips_note=lpips_note,
            with_codecs=codecs,
            with_speed=speed,
            keep=report_images if report else 0,
            tick=tick,
            num_mask_steps=rounds,
            num_flow_steps=steps,
            solver=solver.value if solver else None,
            guidance_schedule=schedule.value if schedule else None,
            noise_temperature=noise,
        )
    waits = help_seconds(COMMANDS) if speed else {}
    failed = reader.failed if reader is not None else []

    if csv:
        write_bytes(csv, as_csv(found).encode())
    if report:
        from v2flow_cli.bench.pictures import token_colours
        from v2flow_cli.bench.report import Page, write_report

        tokens = found.result.tokens_per_image
        page = Page(
            title=f"Photos as {tokens:,} tokens, and back",
            lead=f"What a tokenizer of {found.result.codebook.codebook_size:,} codes keeps of a photo, "
            f"measured on {found.result.protocol.count:,} of them, beside codecs that get as many bytes.",
            bench=found,
            colours=token_colours(tokenizer.codebook),
            command="v2flow bench",
            help_seconds=waits,
            failed=[f"{f.source}: {f.reason}" for f in failed],
        )
        write_report(page, report)
    if json_:
        result_json(
            {
                **as_record(found),
                "help_seconds": waits,
                "report": str(report) if report else None,
                "csv": str(csv) if csv else None,
                "failed": [{"source": f.source, "reason": f.reason} for f in failed],
            }
        )
    else:
        from v2flow_cli.cli.bench_tables import print_bench

        print_bench(found, waits)
        for file in filter(None, (report, csv)):
            result(f"wrote {file}")
    for note in found.notes:
        log(note)
    for failure in failed:
        log(f"left out: {failure.source}: {failure.reason}")
    if failed:
        fail(f"{len(failed)} of the images could not be measured; the figures are of the other ones.")


def _sample_photos() -> Sequence[tuple[str, Image.Image]]:
    from v2flow_cli.assets import sample_photos

    return sample_photos()


def _scales(text: str | None) -> list[float | None]:
    """Guidance scales of ``--cfg``: one number, or several between commas."""
    if text is None:
        return [None]
    try:
        scales = [float(part) for part in text.split(",")]
    except ValueError:
        scales = []
    if not scales or not all(0 <= scale < 1000 for scale in scales) or len({*scales}) < len(scales):
        raise typer.BadParameter(f"{text}: expected different numbers from 0 on, such as 1,3", param_hint="--cfg")
    return list(scales)


def _lpips(net: str, download: bool, device):  # type: ignore[no-untyped-def]
    """(LPIPS, "") or (None, why not); what was asked for with --lpips-download and failed is an error."""
    from v2flow_cli.bench.metrics import load_lpips
    from v2flow_cli.errors import ModelError

    try:
        return load_lpips(net, download=download, device=device), ""
    except ModelError as error:
        if download:
            raise
        return None, str(error)
