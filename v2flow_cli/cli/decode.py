"""``v2flow decode``: token ids back to images."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from v2flow_cli.cli import options
from v2flow_cli.cli.console import fail, log, log_left_out, progress, result, result_json
from v2flow_cli.cli.first_answer import without_collection


def decode(
    tokens: Annotated[
        list[str],
        typer.Argument(help="Token files (.npy), output folders of encode, or globs.", show_default=False),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder for the PNG files; or FILE.png for one image.")
    ] = Path("decoded"),
    model: options.Tokenizer = None,
    decoder: options.Decoder = None,
    cfg: options.Cfg = None,
    rounds: options.Rounds = None,
    steps: options.Steps = None,
    solver: options.SolverName = None,
    schedule: options.Schedule = None,
    guidance: options.GuidanceKind = None,
    noise: options.Noise = None,
    seed: options.Seed = 0,
    batch_size: options.DeviceBatchSize = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    force: options.Force = False,
    json_: options.Json = False,
) -> None:
    """Turn token ids back into PNG images.

    Examples:

        v2flow decode tokens/ -o decoded/

        v2flow decode tokens/ -o decoded-cfg3/ --cfg 3.0 --rounds 4 --steps 8

        v2flow decode tokens/ -o sharp/ --decoder sharp

        v2flow decode tokens/ -o decoded-heun/ --solver heun --seed 7 --force
    """
    from v2flow_cli.store.find import find_files
    from v2flow_cli.store.not_taken import NotTaken
    from v2flow_cli.store.paths import output_folder, user_path

    not_taken = NotTaken()
    out = user_path(out) if out.suffix.lower() == ".png" else output_folder(out)
    files = find_files([_folder_of(path) for path in tokens], {".npy"}, "token files", not_taken=not_taken)

    with without_collection():
        from v2flow_cli.jobs.decode import decode_files, open_token_files
    from v2flow_cli.runtime.device import pick_device, pick_dtype
    from v2flow_cli.tokenizer import V2FlowTokenizer

    target = pick_device(device)
    tokenizer = V2FlowTokenizer.from_pretrained(model, decoder=decoder).to(target)
    opened, report = open_token_files(tokenizer, files, out, force=force)
    report.failures += not_taken.lost
    if report.without_manifest:
        log(f"{report.without_manifest} token files without manifest: decoded as ids of {tokenizer.token_digest}")
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
            **options.sampling(
                cfg=cfg, rounds=rounds, steps=steps, solver=solver, schedule=schedule, guidance=guidance, noise=noise
            ),
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
                "failed": [{"source": f.name, "reason": f.reason} for f in report.failures],
                "not_taken": not_taken.as_json(),
            }
        )
    else:
        result(f"{out}: {len(report.images)} images")
    log_left_out(report.failures, not_taken)
    if report.failures:
        fail(f"{len(report.failures)} of {len(files)} token files could not be decoded.")


def _folder_of(path: str) -> str:
    """``X`` for a missing ``X.npy`` beside an output folder ``X`` of encode; else ``path``."""
    from v2flow_cli.store.token_manifest import TokenManifest

    folder = Path(path.removesuffix(".npy"))
    if path.endswith(".npy") and not Path(path).exists() and TokenManifest.load(folder) is not None:
        log(f"{path} does not exist; decoding the token folder {folder}/ instead")
        return str(folder)
    return path
