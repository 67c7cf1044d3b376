"""``python -m v2flow_cli.demo.page`` (``make demo``): all steps on a few photos, and a page with the results.

photos -> tokens -> photos at two guidance scales -> pictures from a sentence -> a bench -> ``index.html``
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from v2flow_cli.cli import options
from v2flow_cli.cli.console import log, progress, result
from v2flow_cli.cli.entry import run
from v2flow_cli.errors import DataError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from v2flow_cli.bench.report.page import DrawnPicture
    from v2flow_cli.store.find import InputFile
    from v2flow_cli.tokenizer import V2FlowTokenizer

GUIDANCE_SCALES = (1.0, 3.0)
TEMPERATURES = (0.5, 0.9, 1.3)
BATCH_SIZE = 4


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of all output files.")] = Path("demo"),
    images: Annotated[Path | None, typer.Option(help="Folder of photos. Default: five sample photos.")] = None,
    prompt: Annotated[str, typer.Option(help="Prompt to draw.")] = "a red fox",
    limit: Annotated[int, typer.Option(min=1, help="Most photos to show.")] = 12,
    model: options.Tokenizer = None,
    llm: options.Llm = None,
    decoder: options.Decoder = None,
    device: options.Device = "auto",
) -> None:
    """Encode and decode photos, draw a prompt, run a short bench, and write one page with the results."""
    from v2flow_cli.store.find import find_images

    files = find_images([images]) if images is not None else _write_sample_photos(out / "photos")
    if len(files) > limit:
        log(f"{images}: the first {limit} of {len(files)} images; --limit shows more")

    from v2flow_cli.bench.networks import load_networks
    from v2flow_cli.bench.report.page import Page, write_report
    from v2flow_cli.bench.report.token_view import token_view
    from v2flow_cli.bench.results import tables
    from v2flow_cli.bench.run import run_bench
    from v2flow_cli.bench.sweep import parse_sweeps
    from v2flow_cli.jobs.encode import SetEncoder, encode_files
    from v2flow_cli.runtime.device import pick_device, pick_dtype
    from v2flow_cli.store.images import open_image
    from v2flow_cli.tokenizer import V2FlowTokenizer

    target = pick_device(device)
    dtype = pick_dtype("auto", target)
    tokenizer = V2FlowTokenizer.from_pretrained(model, decoder=decoder).to(target)

    with progress("photos to tokens", min(limit, len(files))) as tick:
        encoder = SetEncoder(tokenizer, batch_size=BATCH_SIZE, dtype=dtype)
        report = encode_files(encoder, files[:limit], out / "tokens", force=True, tick=tick)
    failed = [f"{failure.source}: {failure.reason}" for failure in report.failures]
    sources = {failure.source for failure in report.failures}
    readable = [file for file in files[:limit] if str(file.path) not in sources]
    for line in failed:
        log(f"left out: {line}")
    if not readable:
        raise DataError(f"{images}: none of the images could be read.")
    for scale in GUIDANCE_SCALES:
        _decode(tokenizer, readable, out, scale, dtype)
    pictures = _draw(tokenizer, llm, prompt, out / "drawn", target, dtype)

    def photos() -> Iterator[tuple[str, Image.Image]]:
        for file in readable:
            yield file.key, open_image(file.path, str(file.path))

    scales = ",".join(f"{scale:g}" for scale in GUIDANCE_SCALES)
    with progress("bench", len(readable)) as tick:
        bench = run_bench(
            {"v2flow": tokenizer},
            photos(),
            settings=parse_sweeps([f"cfg={scales}"], {"decoder": tokenizer.decoder_name}),
            batch_size=BATCH_SIZE,
            dtype=dtype,
            networks=load_networks(target),
            keep=limit,
            tick=tick,
        )
    tokens = bench.result.coders[0].tokens_per_image
    page = Page(
        title=f"Photos as {tokens:,} words each",
        lead=f"The tokenizer encodes a photo to {tokens:,} of its {tokenizer.config.codebook_size:,} codes, "
        "words that a language model can read and write. The decoder makes a picture of the words. "
        "This machine computed all results on this page.",
        tables=tables([bench]),
        benches=[bench],
        views={"v2flow": token_view(tokenizer)},
        command="python -m v2flow_cli.demo.page",
        drawn=pictures,
        drawn_note="A language model writes the tokens of a picture for the sentence; the tokenizer decodes them "
        "like those of the photos above. A higher temperature gives more varied pictures.",
        notes=bench.notes,
        failed=failed,
    )
    write_report(page, out / "index.html")
    result(f"The page is at {(out / 'index.html').resolve()}")


def _write_sample_photos(folder: Path) -> list[InputFile]:
    """The sample photos as PNG files in ``folder``."""
    from v2flow_cli.assets import sample_photos
    from v2flow_cli.store.files import write_bytes
    from v2flow_cli.store.find import InputFile
    from v2flow_cli.store.images import png_bytes

    files = []
    for name, image in sample_photos():
        write_bytes(folder / f"{name}.png", png_bytes(image))
        files.append(InputFile(folder / f"{name}.png", name))
    return files


def _decode(
    tokenizer: V2FlowTokenizer, files: Sequence[InputFile], out: Path, scale: float, dtype: torch.dtype
) -> None:
    """Decode the saved tokens of ``files`` to PNG files in ``out/guidance-SCALE``."""
    from v2flow_cli.jobs.decode import decode_files, open_token_files
    from v2flow_cli.store.find import InputFile

    tokens = [InputFile(out / "tokens" / f"{file.key}.npy", file.key) for file in files]
    opened, report = open_token_files(tokenizer, tokens, out / f"guidance-{scale:g}", force=True)
    with progress(f"tokens to photos, guidance {scale:g}", len(files)) as tick:
        decode_files(
            tokenizer,
            opened,
            report,
            seed=0,
            batch_size=BATCH_SIZE,
            dtype=dtype,
            tick=tick,
            guidance_scale=scale,
        )


def _draw(
    tokenizer: V2FlowTokenizer,
    llm: str | None,
    prompt: str,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> list[DrawnPicture]:
    """``prompt`` at each temperature, also as PNG files in ``folder``."""
    import numpy as np

    from v2flow_cli.bench.report.page import DrawnPicture
    from v2flow_cli.jobs.generate import Picture, Settings, draw_images
    from v2flow_cli.llm.sample import DrawingLM
    from v2flow_cli.store.files import write_bytes
    from v2flow_cli.store.images import png_bytes

    drawer = DrawingLM.from_pretrained(llm, device, dtype)
    settings = Settings(drawer.sampling.top_k, drawer.sampling.top_p, drawer.sampling.guidance_scale)
    pictures = [Picture(prompt, 0, t, f"temperature-{t:g}", "") for t in TEMPERATURES]
    with progress(f"a sentence to pictures: {prompt}", drawer.vocabulary.tokens_per_image) as tick:
        images = [image for _, image in draw_images(drawer, tokenizer, pictures, settings, dtype, tick)]
    for picture, image in zip(pictures, images):
        write_bytes(folder / f"{picture.name}.png", png_bytes(image))
    return [DrawnPicture(prompt, p.temperature, 0, np.asarray(image)) for p, image in zip(pictures, images)]


def main() -> None:
    """Entry point."""
    run(demo)


if __name__ == "__main__":
    main()
