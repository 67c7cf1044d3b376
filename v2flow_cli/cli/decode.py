"""``v2flow decode``: token ids back to images."""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from v2flow_cli.cli.console import fail, log, progress, result, result_json


class Solver(str, Enum):
    """What ``--solver`` takes."""

    euler = "euler"
    heun = "heun"
    dpmpp = "dpm++"
    ddim = "ddim"


class Schedule(str, Enum):
    """What ``--schedule`` takes."""

    constant = "constant"
    linear = "linear"


class Guidance(str, Enum):
    """What ``--guidance`` takes."""

    cfg = "cfg"
    apg = "apg"


def decode(
    tokens: Annotated[
        list[str],
        typer.Argument(help="Token files (.npy), folders that encode wrote, or globs.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the PNG files.")] = Path("decoded"),
    model: Annotated[
        str | None, typer.Option(help="Tokenizer: folder or hub id. Default: the one inside the package.")
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option(help="faithful (PSNR, SSIM) or sharp (texture), where the model has both. Default: the model's."),
    ] = None,
    cfg: Annotated[
        float | None, typer.Option(min=0.0, help="Guidance scale; 1 means none. Default: the model's.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Unmasking rounds. Default: the model's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="ODE steps in each round. Default: the model's.")] = None,
    solver: Annotated[Solver | None, typer.Option(help="ODE solver. Default: the model's.")] = None,
    schedule: Annotated[
        Schedule | None,
        typer.Option(help="linear raises the guidance from 1 as sampling goes on. Default: the model's."),
    ] = None,
    guidance: Annotated[
        Guidance | None, typer.Option(help="apg spares colours and contrast at high --cfg. Default: the model's.")
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(min=0.0, help="Factor on the initial noise; 0 is the mean. Default: the model's."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise; each image's own is drawn from it and its key.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images decoded at a time.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (bf16 where it is fast), fp32 or bf16.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Overwrite images that exist.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Turn token ids back into PNG images.

    Examples:

        v2flow decode tokens/ -o decoded/

        v2flow decode tokens/ -o decoded-cfg3/ --cfg 3.0 --rounds 4 --steps 8

        v2flow decode tokens/ -o sharp/ --decoder sharp

        v2flow decode tokens/ -o decoded-heun/ --solver heun --seed 7 --force
    """
    from v2flow_cli.store.images import find_files

    files = find_files([_folder_of(given) for given in tokens], {".npy"}, "token files")

    from v2flow_cli.jobs.decode import decode_files, open_token_files
    from v2flow_cli.runtime.device import pick_device, pick_dtype
    from v2flow_cli.tokenizer import V2FlowTokenizer

    target = pick_device(device)
    tokenizer = V2FlowTokenizer.from_pretrained(model, decoder=decoder).to(target)
    opened, report = open_token_files(tokenizer, files, out, force=force)
    if report.without_manifest:
        log(f"{report.without_manifest} token files without manifest: taken for ids of {tokenizer.token_digest}")
    start = time.perf_counter()
    with progress("decode", sum(len(rows.keys) for rows in opened)) as tick:
        decode_files(
            tokenizer,
            opened,
            report,
            seed=seed,
            batch_size=batch_size,
            dtype=pick_dtype(dtype, target),
            tick=tick,
            guidance_scale=cfg,
            num_mask_steps=rounds,
            num_flow_steps=steps,
            solver=solver.value if solver else None,
            guidance_schedule=schedule.value if schedule else None,
            guidance=guidance.value if guidance else None,
            noise_temperature=noise,
        )
    seconds = time.perf_counter() - start

    if json_:
        result_json(
            {
                "output": str(out),
                "images": [str(path) for path in report.images],
                "tokenizer_digest": tokenizer.token_digest,
                "decoder": tokenizer.decoder_name,
                "seed": seed,
                "seconds": seconds,
                "failed": [{"source": f.source, "reason": f.reason} for f in report.failures],
            }
        )
    else:
        result(f"{out}: {len(report.images)} images")
    for failure in report.failures:
        log(f"left out: {failure.source}: {failure.reason}")
    if report.failures:
        fail(f"{len(report.failures)} of {len(files)} token files could not be decoded.")


def _folder_of(given: str) -> str:
    """``X`` for a missing ``X.npy`` beside a folder ``X`` that encode wrote; else ``given``."""
    from v2flow_cli.store.token_file import TokenManifest

    folder = Path(given.removesuffix(".npy"))
    if given.endswith(".npy") and not Path(given).exists() and TokenManifest.load(folder) is not None:
        log(f"{given} does not exist; decoding the token folder {folder}/ instead")
        return str(folder)
    return given
