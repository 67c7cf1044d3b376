"""``v2flow bench draw``: whether an LLM's drawings show the things of their prompts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from v2flow_cli.cli import options
from v2flow_cli.cli.console import log, progress, result, result_json

if TYPE_CHECKING:
    from v2flow_cli.bench.draw import DrawBench
    from v2flow_cli.bench.judge import Judge


def draw(
    references: Annotated[
        list[str],
        typer.Argument(help="Pictures with titles: folders or WebDataset tars, KEY.json or KEY.txt beside each."),
    ],
    features: Annotated[
        str,
        typer.Option(
            metavar="FILE|MODEL", help="SqueezeNet 1.1, VGG16 or AlexNet (.safetensors), or a CLIP folder or hub id."
        ),
    ],
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A prompt a line; `-` is stdin. Default: from the titles.")
    ] = None,
    per_kind: Annotated[
        int, typer.Option(min=1, help="At most so many prompts of each kind: thing, colour, number, place.")
    ] = 50,
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Titled pictures that the LLM was not trained on, to measure the judge. Default: some of REFERENCES.",
        ),
    ] = None,
    train: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="Titled pictures that the LLM was trained on. Default: REFERENCES."),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the PNG files.")] = Path("drawn"),
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a sheet of all pictures.")] = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Pictures per prompt.")] = 1,
    temp: Annotated[float | None, typer.Option(min=0.0, help="LLM temperature. Default: the LLM's.")] = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    llm_cfg: options.LlmCfg = None,
    tokens: options.MostTokens = None,
    decoder: options.Decoder = None,
    llm_model: options.Llm = None,
    model: options.Tokenizer = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts, and the first seed of the pictures.")] = 0,
    batch_size: options.BatchSize = 16,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    force: options.Force = False,
    json_: options.Json = False,
) -> None:
    """Draw prompts and check the pictures: the thing by its nearest neighbours, its colour, number and place.

    Examples:

        v2flow bench draw drawings.tar --features squeezenet1_1_features.safetensors --report sheet.html

        v2flow bench draw drawings.tar --features openai/clip-vit-base-patch32 --prompts prompts.txt -n 4

        v2flow bench draw drawings.tar --features features.safetensors --held-out held-out.tar --train scenes/ --json
    """
    from v2flow_cli.bench.draw import measure_drawing
    from v2flow_cli.bench.features import load_space
    from v2flow_cli.bench.judge import Judge
    from v2flow_cli.bench.prompts import make_prompts, parse_prompts, without_colour
    from v2flow_cli.bench.references import nouns_with_colours, read_references, split_held_out
    from v2flow_cli.cli.generate import read_prompts as read_lines
    from v2flow_cli.errors import DataError
    from v2flow_cli.jobs.generate import Settings, load_models, plan_pictures
    from v2flow_cli.llm.sampling import stored_sampling
    from v2flow_cli.runtime.device import pick_device
    from v2flow_cli.store.files import check_absent, write_bytes
    from v2flow_cli.store.not_taken import NotTaken
    from v2flow_cli.store.paths import check_writable

    check_writable([report])
    not_taken = NotTaken()
    library = read_references(references, not_taken)
    if held_out:
        held_out_pictures = read_references(held_out, not_taken)
        keys = {reference.key for reference in held_out_pictures}
        library = [reference for reference in library if reference.key not in keys]
    else:
        library, held_out_pictures = split_held_out(library)
    if not library:
        raise DataError(f"{', '.join(references)}: all pictures are held out, so none is left for comparison.")
    if prompts is None:
        parsed = make_prompts(nouns_with_colours(library), per_kind, seed)
    else:
        parsed = parse_prompts(read_lines(prompts), {without_colour(n) for r in library for n in r.names})
    if not parsed:
        raise DataError(f"{', '.join(references)}: no title has two pictures; use --prompts FILE.")

    space = load_space(features, pick_device(device))
    tokenizer, llm, number_format = load_models(model, llm_model, device, dtype, decoder=decoder, option="--model")
    llm.length(tokens)  # a number that it cannot draw is an error before anything is drawn
    sampling = options.llm_sampling(stored_sampling(llm.name), top_k=top_k, top_p=top_p, guidance_scale=llm_cfg)
    temperature = sampling.temperature if temp is None else temp
    seeds = list(range(seed, seed + count))
    names = [picture.name for picture in plan_pictures([p.text for p in parsed], seeds, [temperature])]
    check_absent([out / f"{name}.png" for name in names], force)
    for prompt in parsed:
        llm.prompt(prompt.text)  # a prompt that is too long is an error before anything is drawn
    with progress("references", len(library)) as tick:
        judge = Judge(space, library, tick)
    training: Judge = judge
    if train:
        pictures = read_references(train, not_taken)
        with progress("training pictures", len(pictures)) as tick:
            training = Judge(space, pictures, tick)
    with progress("draw", len(names)) as tick:
        bench = measure_drawing(
            llm,
            tokenizer,
            parsed,
            judge,
            training,
            held_out_pictures,
            out,
            Settings(sampling.top_k, sampling.top_p, sampling.guidance_scale, num_tokens=tokens),
            temperature=temperature,
            seeds=seeds,
            per_kind=max(per_kind, 100),
            batch_size=batch_size,
            dtype=number_format,
            tick=tick,
        )
    not_taken.log(log)
    things = len(nouns_with_colours(library, 1))
    facts = {
        "LLM": f"{llm.name}, digest {llm.digest}",
        "tokenizer": f"digest {tokenizer.token_digest}, decoder {tokenizer.decoder_name}",
        "sampling": f"temperature {temperature:g}, seeds {seeds[0]} to {seeds[-1]}",
        "judge": space.definition,
        "references": f"{len(library):,} pictures of {things:,} things; {len(held_out_pictures):,} held out",
    }
    if report:
        from v2flow_cli.bench.report.draw_page import DrawSheet, render

        drawings = [(drawing.prompt, drawing.pixels, drawing.verdict) for drawing in bench.drawings]
        page = DrawSheet(drawings, bench.figures, bench.copies, library, facts, "v2flow bench draw")
        write_bytes(report, render(page).encode())
    if json_:
        result_json(
            {
                **_record(bench, judge),
                **facts,
                "report": str(report) if report else None,
                "not_taken": not_taken.as_json(),
            }
        )
        return
    _print(bench)
    result(f"wrote {len(bench.drawings)} pictures to {out}" + (f", and {report}" if report else ""))
    others = [drawing.prompt.text for drawing in bench.drawings if drawing.prompt.kind == "other"]
    if others:
        log(f"note: {len(others)} pictures are not checked; their prompts name no title of the references: {others[0]}")


def _record(bench: DrawBench, judge: Judge) -> dict[str, Any]:
    """Everything as JSON values."""
    return {
        "kinds": [dataclasses.asdict(figures) for figures in bench.figures],
        "copies": bench.copies and dataclasses.asdict(bench.copies),
        "pictures": [
            {
                "path": str(drawing.file),
                "prompt": drawing.prompt.text,
                "kind": drawing.prompt.kind,
                "asked": [dataclasses.asdict(thing) for thing in drawing.prompt.things],
                "seen": [judge.references[answers[0]].names[0] for answers in drawing.verdict.answers],
                "seen_keys": [judge.references[answers[0]].key for answers in drawing.verdict.answers],
                "main_colour": drawing.verdict.colour,
                "objects": drawing.verdict.count,
                "right": drawing.verdict.right,
                "distance": drawing.verdict.distance,
            }
            for drawing in bench.drawings
        ],
    }


def _print(bench: DrawBench) -> None:
    from v2flow_cli.bench.report.draw_page import copies_note, copy_rows, table_rows
    from v2flow_cli.cli.text_table import text_table

    result(text_table(*table_rows(bench.figures)) + "\n")
    if bench.copies:
        result(text_table(*copy_rows(bench.copies)) + "\n")
        result(copies_note(bench.copies))
