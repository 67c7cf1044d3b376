"""``v2flow generate``: a sentence to pictures; the place where the LLM's ids meet the decoder."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from v2flow_cli.cli.console import log, progress, result, result_json
from v2flow_cli.cli.decode import Solver
from v2flow_cli.errors import DataError, ModelError

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Picture:
    """One picture to draw; ``name`` is its file's, without suffix."""

    prompt: str
    seed: int
    temperature: float
    name: str


def generate(
    prompt: Annotated[list[str], typer.Argument(help="What to draw; one or more.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the PNG files.")] = Path("generated"),
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Pictures per prompt.")] = 1,
    temp: Annotated[str, typer.Option(help="LLM temperature; several, as 0.5,0.9,1.3, give a grid.")] = "1.0",
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Keep this probability mass.")] = 1.0,
    llm_cfg: Annotated[float, typer.Option(min=0.0, help="Guidance scale of the LLM; 1 means none.")] = 1.0,
    cfg: Annotated[
        float | None, typer.Option(min=0.0, help="Guidance scale of the decoder. Default: the model's.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Unmasking rounds. Default: the model's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="ODE steps in each round. Default: the model's.")] = None,
    solver: Annotated[Solver | None, typer.Option(help="ODE solver. Default: the model's.")] = None,
    seed: Annotated[str, typer.Option(help="First seed; or, as 1,5,7, the seeds themselves.")] = "0",
    save_tokens: Annotated[bool, typer.Option("--save-tokens", help="Write the token ids as .npy too.")] = False,
    model: Annotated[
        str | None, typer.Option(help="LLM: folder or hub id. Default: the one inside the package.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Image tokenizer: folder or hub id. Default: the one inside the package.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at a time.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (bf16 where it is fast), fp32 or bf16.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Draw pictures from sentences.

    Examples:

        v2flow generate "a red fox" --temp 0.9

        v2flow generate "a red fox" --temp 0.5,0.9,1.3 --seed 1,2 -o foxes/

        v2flow generate "a boat" "a dog" -n 4 --top-k 500 --save-tokens
    """
    temperatures, seeds = _numbers("--temp", temp, float), _numbers("--seed", seed, int)
    if len(seeds) > 1 and count > 1:
        raise DataError(f"-n {count} and --seed {seed}: give a count with a first seed, or a list of seeds.")
    if len(seeds) == 1:
        seeds = list(range(seeds[0], seeds[0] + count))
    pictures = plan_pictures(prompt, seeds, temperatures)
    grids = sorted({p.name.rpartition("-t")[0] for p in pictures}) if len(temperatures) > 1 else []

    import torch

    from v2flow_cli.llm.sample import DrawingLM
    from v2flow_cli.store.files import check_absent
    from v2flow_cli.tokenizer import V2FlowTokenizer
    from v2flow_cli.tokenizer.hardware import pick_device, pick_dtype

    names = [p.name for p in pictures]
    suffixes = [".png", ".npy"] if save_tokens else [".png"]
    check_absent([out / f"{n}{s}" for n in names for s in suffixes] + [out / f"{g}-grid.png" for g in grids], force)
    target = pick_device(device)
    number_format = pick_dtype(dtype, target)
    image_tokenizer = V2FlowTokenizer.from_pretrained(tokenizer).to(target)
    llm = DrawingLM.from_pretrained(model, target, number_format)
    if llm.vocabulary.tokenizer_digest != image_tokenizer.digest:
        raise ModelError(
            f"{llm.name} draws tokens of tokenizer {llm.vocabulary.tokenizer_digest}, but the tokenizer at hand is "
            f"{image_tokenizer.digest}. Give the one it was taught with: --tokenizer FOLDER."
        )
    for text in dict.fromkeys(p.prompt for p in pictures):
        llm.prompt(text)  # a prompt that is too long is told before anything is drawn

    settings = {"top_k": top_k, "top_p": top_p, "llm_guidance_scale": llm_cfg, "guidance_scale": cfg}
    settings |= {"num_mask_steps": rounds, "num_flow_steps": steps, "solver": solver.value if solver else None}
    settings |= {"tokenizer_digest": image_tokenizer.digest, "llm_digest": llm.digest}
    start = time.perf_counter()
    drawn: dict[str, Image.Image] = {}
    all_ids = []
    with progress("generate", len(pictures)) as tick:
        for first in range(0, len(pictures), batch_size):
            batch = pictures[first : first + batch_size]
            token_ids = llm.draw(
                [p.prompt for p in batch],
                seeds=[p.seed for p in batch],
                temperatures=[p.temperature for p in batch],
                top_k=top_k,
                top_p=top_p,
                guidance_scale=llm_cfg,
            )
            autocast = torch.autocast(target.type, number_format, enabled=number_format != torch.float32)
            with torch.inference_mode(), autocast:
                images = image_tokenizer.decode(
                    token_ids,
                    guidance_scale=cfg,
                    num_mask_steps=rounds,
                    num_flow_steps=steps,
                    solver=settings["solver"],
                    seeds=[p.seed for p in batch],
                )
            for picture, image in zip(batch, image_tokenizer.image_processor.to_pil(images)):
                about = {"prompt": picture.prompt, "seed": picture.seed, "temperature": picture.temperature}
                _write_png(out / f"{picture.name}.png", image, about | settings)
                drawn[picture.name] = image
            all_ids.append(token_ids.cpu())
            tick(len(batch))
    if save_tokens:
        _save_tokens(out, names, torch.cat(all_ids).numpy(), image_tokenizer, force)
    for grid in grids:
        of_prompt = [p for p in pictures if p.name.rpartition("-t")[0] == grid]
        sheet = figure(of_prompt, [drawn[p.name] for p in of_prompt], temperatures, seeds)
        _write_png(out / f"{grid}-grid.png", sheet, {"prompt": of_prompt[0].prompt} | settings)
    seconds = time.perf_counter() - start

    if json_:
        images_out = [p.__dict__ | {"path": str(out / f"{p.name}.png")} for p in pictures]
        result_json(
            {"images": images_out, "grids": [str(out / f"{g}-grid.png") for g in grids], "seconds": seconds} | settings
        )
        return
    for name in [*names, *(f"{g}-grid" for g in grids)]:
        result(str(out / f"{name}.png"))
    log(f"{len(pictures)} pictures in {seconds:.1f} s")


def plan_pictures(prompts: Sequence[str], seeds: Sequence[int], temperatures: Sequence[float]) -> list[Picture]:
    """Every prompt at every seed and temperature, under file names that differ.

    Raises:  DataError for an empty prompt.
    """
    pictures, slugs = [], set()
    for number, prompt in enumerate(dict.fromkeys(prompts), 1):
        if not prompt.strip():
            raise DataError(f'prompt {number} is empty; say what to draw, such as "a red fox".')
        base = re.sub(r"\W+", "-", prompt.lower()).strip("-_")[:40].strip("-_") or "picture"
        slug = base if base not in slugs else f"{base}-{number}"
        slugs.add(slug)
        for seed in seeds:
            pictures += [Picture(prompt, seed, t, f"{slug}-t{t:g}-s{seed}") for t in temperatures]
    return pictures


def figure(
    pictures: Sequence[Picture],
    images: Sequence[Image.Image],
    temperatures: Sequence[float],
    seeds: Sequence[int],
) -> Image.Image:
    """The pictures of one prompt as Figure 6: a row for each seed, a column for each temperature, labelled."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = images[0].size
    left, top, gap = 90, 56, 4
    size = (left + len(temperatures) * (width + gap), top + len(seeds) * (height + gap))
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    pen.text((8, 6), pictures[0].prompt[:100], fill="black", font=font)
    for column, temperature in enumerate(temperatures):
        pen.text((left + column * (width + gap), 32), f"T = {temperature:g}", fill="black", font=font)
    for row, seed in enumerate(seeds):
        pen.text((8, top + row * (height + gap) + height // 2), f"seed {seed}", fill="black", font=font)
    for picture, image in zip(pictures, images):
        column, row = temperatures.index(picture.temperature), seeds.index(picture.seed)
        sheet.paste(image, (left + column * (width + gap), top + row * (height + gap)))
    return sheet


def _numbers(option: str, text: str, kind: type) -> list[Any]:
    """Distinct numbers of a comma-separated option, in order."""
    try:
        values = list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise DataError(f"{option} {text}: expected numbers with commas between them.") from None
    if not all(0 <= value < 2**63 for value in values):  # also false for NaN
        raise DataError(f"{option} {text}: expected numbers from 0 up.")
    return values


def _write_png(path: Path, image: Image.Image, about: dict[str, Any]) -> None:
    """``image`` with ``about`` as text metadata; settings left to the model are not written."""
    import io

    from PIL.PngImagePlugin import PngInfo

    from v2flow_cli.store.files import write_bytes

    info = PngInfo()
    for key, value in about.items():
        if value is not None:
            info.add_text(f"v2flow:{key}", str(value))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    write_bytes(path, buffer.getvalue())


def _save_tokens(out: Path, names: Sequence[str], ids: Any, image_tokenizer: Any, force: bool) -> None:
    """One ``.npy`` a picture beside its PNG, listed in ``manifest.json`` with those that are there already."""
    from v2flow_cli.store.token_file import TokenManifest, save_token_ids

    size, length = image_tokenizer.grid_of(ids.shape[1]), ids.shape[1]
    codebook_size = image_tokenizer.config.codebook_size
    manifest = TokenManifest(image_tokenizer.digest, size, codebook_size, length, dict.fromkeys(names, 1))
    before = TokenManifest.load(out)
    if before is not None and before.same_tokens(manifest):
        manifest.files.update(before.files)
    elif before is not None and not force:
        raise DataError(f"{out}/manifest.json belongs to tokens of another tokenizer. Use another -o, or --force.")
    for name, row in zip(names, ids):
        save_token_ids(out / f"{name}.npy", row, codebook_size)
    manifest.save(out)
