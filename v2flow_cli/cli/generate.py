"""``v2flow generate``: prompts to pictures, and pictures to captions if the LLM was trained for that."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from v2flow_cli.cli import options
from v2flow_cli.cli.console import log, progress, result, result_json
from v2flow_cli.cli.first_answer import without_collection
from v2flow_cli.errors import DataError


def generate(
    prompt: Annotated[list[str] | None, typer.Argument(help="What to draw; one or more.", show_default=False)] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A prompt a line; `-` is stdin. A second run continues.")
    ] = None,
    from_image: Annotated[
        list[Path] | None, typer.Option(metavar="IMAGE", help="Caption IMAGE instead; repeatable.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the PNG files.")] = Path("generated"),
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Pictures per prompt.")] = 1,
    temp: Annotated[
        str | None,
        typer.Option(
            help="LLM temperature; several, as 0.5,0.9,1.3, give a grid. Default: the LLM's; 0 for --from-image."
        ),
    ] = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    llm_cfg: options.LlmCfg = None,
    tokens: options.MostTokens = None,
    decoder: options.Decoder = None,
    cfg: options.Cfg = None,
    rounds: options.Rounds = None,
    steps: options.Steps = None,
    solver: options.SolverName = None,
    schedule: options.Schedule = None,
    guidance: options.GuidanceKind = None,
    noise: options.Noise = None,
    seed: Annotated[str, typer.Option(help="First seed; or several seeds, as 1,5,7.")] = "0",
    save_tokens: Annotated[bool, typer.Option("--save-tokens", help="Write the token ids as .npy too.")] = False,
    model: options.Llm = None,
    tokenizer: options.ImageTokenizer = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at a time.")] = 16,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    force: options.Force = False,
    json_: options.Json = False,
) -> None:
    """Draw pictures from prompts.

    Examples:

        v2flow generate "a red fox" --temp 0.9

        v2flow generate "a red fox" --temp 0.5,0.9,1.3 --seed 1,2 -o foxes/

        v2flow generate --prompts prompts.txt -n 4 --top-k 500 -o many/

        v2flow generate "a fox" --tokens 32 --model runs/flextok/llm_whole --tokenizer runs/flextok/vocabulary_drawings

        v2flow generate --from-image photo.jpg --model runs/my-llm
    """
    if sum(map(bool, (prompt, prompts, from_image))) != 1:
        raise typer.BadParameter("expected exactly one of prompts, --prompts FILE and --from-image IMAGE.")
    seeds = options.numbers("--seed", seed, 0)
    temperatures = options.numbers("--temp", temp, 0, float) if temp is not None else []
    if from_image:
        _caption(from_image, temperatures or [0.0], seeds, tokens, model, tokenizer, device, dtype, json_)
        return

    from v2flow_cli.llm.sampling import DEFAULT_LLM, stored_sampling

    stored = stored_sampling(model or DEFAULT_LLM)
    sampling = options.llm_sampling(stored, top_k=top_k, top_p=top_p, guidance_scale=llm_cfg)
    temperatures = temperatures or [sampling.temperature]
    if len(seeds) > 1 and count > 1:
        raise DataError(f"-n {count} and --seed {seed}: use a count with a first seed, or a list of seeds.")
    if len(seeds) == 1:
        seeds = list(range(seeds[0], seeds[0] + count))

    with without_collection():
        from v2flow_cli.jobs.generate import (
            PictureList,
            Settings,
            about,
            about_grid,
            check_tokens_folder,
            draw_pictures,
            figure,
            is_drawn_as,
            load_models,
            model_digests,
            plan_pictures,
            write_png,
        )
    from v2flow_cli.store.files import check_absent
    from v2flow_cli.store.paths import names_a_picture, output_folder, user_path

    pictures = plan_pictures(read_prompts(prompts) if prompts else prompt or [], seeds, temperatures)
    grids = sorted({p.group for p in pictures}) if len(temperatures) > 1 else []
    if names_a_picture(out, len(pictures)):
        pictures = [dataclasses.replace(pictures[0], name=out.stem, group=out.stem)]
        out = user_path(out).parent
    else:
        out = output_folder(out)
    suffixes = [".png", ".npy"] if save_tokens else [".png"]
    if not prompts:
        names = [p.name for p in pictures]
        check_absent([out / f"{n}{s}" for n in names for s in suffixes] + [out / f"{g}-grid.png" for g in grids], force)
    image_tokenizer, llm, number_format = load_models(tokenizer, model, device, dtype, decoder=decoder)
    length = llm.length(tokens)
    for text in dict.fromkeys(p.prompt for p in pictures):
        llm.prompt(text)  # a prompt that is too long is an error before anything is drawn
    if save_tokens and not force:
        check_tokens_folder(out, image_tokenizer, length)

    settings = Settings(
        sampling.top_k,
        sampling.top_p,
        sampling.guidance_scale,
        **options.sampling(
            cfg=cfg, rounds=rounds, steps=steps, solver=solver, schedule=schedule, guidance=guidance, noise=noise
        ),
        num_tokens=tokens,
    )
    models = model_digests(llm, image_tokenizer)
    records = {p.name: about(p, settings, models) for p in pictures}
    grid_records = {p.group: about_grid(records[p.name], temperatures, seeds) for p in pictures if grids}
    listed = PictureList(out, [f"{p.name}.png" for p in pictures] if force else ()) if prompts else None
    kept = set()
    if listed is not None and not force:  # a prompt whose grid is not that of its pictures is drawn again
        done = [p for p in pictures if is_drawn_as(out / f"{p.name}.png", records[p.name])]
        ready = {p.name for p in done if not save_tokens or (out / f"{p.name}.npy").exists()}
        partly = {p.group for p in pictures if p.name not in ready} if grids else set()
        partly |= {grid for grid, record in grid_records.items() if not is_drawn_as(out / f"{grid}-grid.png", record)}
        kept = {p.name for p in done if p.name in ready and p.group not in partly}
        for picture in done:
            listed.add(f"{picture.name}.png", records[picture.name])
    todo = [p for p in pictures if p.name not in kept]
    if kept:
        log(f"{len(kept)} of {len(pictures)} pictures exist already")
    start = time.perf_counter()
    waiting: dict[str, list] = {grid: [] for grid in grids}
    with progress("generate", len(todo)) as tick:
        for picture, image in draw_pictures(
            llm,
            image_tokenizer,
            todo,
            out,
            settings,
            batch_size=batch_size,
            dtype=number_format,
            save_tokens=save_tokens,
            tick=tick,
        ):
            if listed is not None:
                listed.add(f"{picture.name}.png", records[picture.name])
            if grids:
                waiting[picture.group].append((picture, image))
                if len(waiting[picture.group]) == len(seeds) * len(temperatures):
                    group, images = zip(*waiting.pop(picture.group))
                    sheet = figure(group, images, temperatures, seeds)
                    write_png(out / f"{picture.group}-grid.png", sheet, grid_records[picture.group])
    seconds = time.perf_counter() - start

    if json_:
        images_out = [{"path": str(out / f"{p.name}.png"), "kept": p.name in kept, **records[p.name]} for p in pictures]
        result_json({"images": images_out, "grids": [str(out / f"{g}-grid.png") for g in grids], "seconds": seconds})
        return
    for name in [*(p.name for p in todo), *(f"{g}-grid" for g in grids)]:
        result(str(out / f"{name}.png"))
    log(f"{len(todo)} pictures in {seconds:.1f} s")


def _caption(
    paths: Sequence[Path],
    temperatures: Sequence[float],
    seeds: Sequence[int],
    tokens: int | None,
    model: str | None,
    tokenizer: str | None,
    device: str,
    dtype: str,
    json_: bool,
) -> None:
    """Print the LLM's caption of each picture, at each seed and temperature."""
    with without_collection():
        from v2flow_cli.jobs.generate import load_models
    from v2flow_cli.store.images import open_image
    from v2flow_cli.tokenizer.preprocess import image_to_tensor

    photos = [(path, open_image(path, str(path))) for path in paths]
    image_tokenizer, llm, _ = load_models(tokenizer, model, device, dtype)
    captions = []
    for path, photo in photos:
        pixels = image_to_tensor(photo, image_tokenizer.config.image_size)[None].to(image_tokenizer.device)
        (token_ids,) = image_tokenizer.encode(pixels, llm.length(tokens), refine_steps=0)
        for seed in seeds:
            for temperature in temperatures:
                caption = llm.caption(token_ids, seed=seed, temperature=temperature)
                captions.append({"path": str(path), "seed": seed, "temperature": temperature, "caption": caption})
                if not json_:
                    result(f"{path}: {caption}" if len(paths) > 1 else caption)
    if json_:
        result_json({"captions": captions})


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not blank.  Raises: DataError for a file that cannot be read or has none."""
    from v2flow_cli.store.paths import user_path
    from v2flow_cli.store.text import decode_text, lines_of, one_line, read_text

    text = decode_text(sys.stdin.buffer.read(), "--prompts -") if str(path) == "-" else read_text(user_path(path))
    lines = [one_line(line) for line in lines_of(text) if line.strip()]
    if not lines:
        raise DataError(f"--prompts {path}: no prompt in it; expected one a line.")
    return lines
