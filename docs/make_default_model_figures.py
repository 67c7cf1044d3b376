"""Write the pictures of docs/default-model.md: training curves, reconstructions, drawings.

    python docs/make_default_model_figures.py
    python docs/make_default_model_figures.py drawings   # one of curves, reconstructions, drawings

The curves need the logs that `make default-model` writes to runs/default/. The photos are those of the package;
everything else comes from the embedded model.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from v2flow_cli.assets import sample_photos
from v2flow_cli.jobs.generate import Settings, draw_pictures, plan_pictures
from v2flow_cli.llm.sample import DrawingLM
from v2flow_cli.llm.sampling import DEFAULT_LLM, stored_sampling
from v2flow_cli.tokenizer import V2FlowTokenizer

DOCS = Path(__file__).resolve().parent
IMAGES = DOCS / "images"
RUNS = DOCS.parent / "runs" / "default"
PROMPTS = (
    "a red fox",
    "a cat",
    "a dog",
    "a house",
    "a tree",
    "a red apple",
    "a sailboat",
    "a car",
    "a sunflower",
    "pizza",
    "a horse",
    "a snowman",
    "an elephant",
    "a guitar",
    "a rocket",
    "a penguin",
    "a bicycle",
    "a blue fox",
    "two cats",
    "a photo of a golden retriever",
)


def reconstructions() -> None:
    """Five photos and their centres, and below them their reconstructions from 256 tokens by each decoder."""
    tokenizer = V2FlowTokenizer.from_pretrained()
    photos = []
    for _, photo in sample_photos():
        width, height = photo.size
        side = min(width, height) // 2
        left, top = (width - side) // 2, (height - side) // 2
        photos += [photo, photo.crop((left, top, left + side, top + side))]
    pixels = torch.stack([tokenizer.image_processor.preprocess_one(photo, 256) for photo in photos])
    ids = tokenizer.encode(pixels)
    back = [tokenizer.decode(ids, decoder=name) for name in tokenizer.decoder_names]
    tiles = tokenizer.image_processor.to_pil(torch.cat([pixels, *back]))
    sheet(tiles, [""] * len(tiles), columns=10, side=160).save(IMAGES / "default-model-reconstructions.jpg", quality=88)


def drawings() -> None:
    """Twenty prompts, as `generate` draws them by default, seed 0."""
    tokenizer, llm = V2FlowTokenizer.from_pretrained(), DrawingLM.from_pretrained(None, torch.device("cpu"))
    sampling = stored_sampling(DEFAULT_LLM)
    pictures = plan_pictures(PROMPTS, [0], [sampling.temperature])
    settings = Settings(sampling.top_k, sampling.top_p, sampling.guidance_scale)
    with tempfile.TemporaryDirectory() as folder:
        drawn = draw_pictures(llm, tokenizer, pictures, Path(folder), settings, batch_size=10)
        tiles = [image for _, image in drawn]
    sheet(tiles, PROMPTS, columns=5, side=224).save(IMAGES / "default-model-drawings.jpg", quality=88)


def sheet(tiles: Sequence[Image.Image], labels: Sequence[str], columns: int, side: int) -> Image.Image:
    """Tiles in rows of ``columns``, each scaled to ``side`` pixels over its label."""
    text = 18 if any(labels) else 0
    gap, rows = 4, -(-len(tiles) // columns)
    page = Image.new("RGB", (columns * (side + gap) - gap, rows * (side + text + gap) - gap), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for number, (tile, label) in enumerate(zip(tiles, labels)):
        x, y = number % columns * (side + gap), number // columns * (side + text + gap)
        page.paste(tile.resize((side, side), Image.Resampling.LANCZOS), (x, y))
        pen.text((x + 2, y + side + 2), label, fill="black", font=font)
    return page


def curves() -> None:
    """Training curves of the tokenizer's stages and of the LLM."""
    panels = [
        ("stage 1: PSNR of the autoencoder, dB", series(RUNS / "autoencoder" / "metrics.jsonl", "train/psnr_db")),
        ("stage 3: regression loss", series(RUNS / "tokenizer_128" / "metrics.jsonl", "train/regression_loss")),
        ("stage 4: regression loss", series(RUNS / "tokenizer_256" / "metrics.jsonl", "train/regression_loss")),
        ("stage 4: PSNR on training pictures, dB", series(RUNS / "tokenizer_256" / "metrics.jsonl", "train/psnr_db")),
        ("stage 7: nats a visual token", history(RUNS / "llm_centred", "visual_loss")),
        ("stage 9: nats a visual token", history(RUNS / "llm", "visual_loss")),
    ]
    width, height, gap = 300, 200, 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * (width + gap)} {3 * (height + gap)}" '
        'font-family="sans-serif" font-size="11" fill="#333"><rect width="100%" height="100%" fill="#fff"/>'
    ]
    for number, (title, points) in enumerate(panels):
        x0, y0 = gap + number % 2 * (width + gap), 24 + number // 2 * (height + gap)
        high_x, low, high = max(x for x, _ in points), min(y for _, y in points), max(y for _, y in points)
        inner = height - 40
        line = " ".join(
            f"{x0 + x / high_x * (width - 20):.1f},{y0 + (high - y) / (high - low) * inner:.1f}" for x, y in points
        )
        parts.append(f'<text x="{x0}" y="{y0 - 8}" font-weight="bold">{title}</text>')
        for value in (low, (low + high) / 2, high):
            y = y0 + (high - value) / (high - low) * inner
            parts.append(f'<text x="{x0 - 4}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>')
            parts.append(f'<line x1="{x0}" x2="{x0 + width - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x0 + width - 20}" y="{y0 + inner + 16}" text-anchor="end">{high_x:,} steps</text>')
        parts.append(f'<polyline points="{line}" fill="none" stroke="#0a6ebd" stroke-width="1.5"/>')
    (IMAGES / "default-model-curves.svg").write_text("".join(parts) + "</svg>\n", encoding="utf-8")


def series(path: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of one figure in a run's metrics."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line[name]) for line in lines if name in line]


def history(run: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of one figure in the newest checkpoint of a fine-tuning."""
    newest = max((run / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    log = json.loads((newest / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [(line["step"], line[name]) for line in log if name in line]


FIGURES = {f.__name__: f for f in (curves, reconstructions, drawings)}

if __name__ == "__main__":
    for wanted in sys.argv[1:] or FIGURES:
        FIGURES[wanted]()
