"""Prompts to PNG files: the work of ``v2flow generate``. The LLM's ids go through the decoder here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from v2flow_cli.errors import DataError, foreign_errors
from v2flow_cli.llm.sample import STOPPED, DrawingLM
from v2flow_cli.recipe.schema import SAMPLING_OPTIONS
from v2flow_cli.runtime.device import inference, pick_device, pick_dtype
from v2flow_cli.store.files import append_line, write_bytes
from v2flow_cli.store.images import png_bytes
from v2flow_cli.store.text import printable, whole_lines
from v2flow_cli.store.token_file import save_token_ids
from v2flow_cli.store.token_manifest import TokenManifest
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.preprocess import to_pil

RECORD = "generated.jsonl"


@dataclass(frozen=True)
class Picture:
    """One picture to draw; ``name`` is its file's, without suffix, and ``group`` that of its prompt's grid."""

    prompt: str
    seed: int
    temperature: float
    name: str
    group: str


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn; None takes the decoder's own value."""

    top_k: int = 0
    top_p: float = 1.0
    llm_guidance_scale: float = 1.0
    guidance_scale: float | None = None
    num_mask_steps: int | None = None
    num_flow_steps: int | None = None
    solver: str | None = None
    guidance_schedule: str | None = None
    guidance: str | None = None
    noise_temperature: float | None = None
    num_tokens: int | None = None  # at most so many a picture


def plan_pictures(prompts: Sequence[str], seeds: Sequence[int], temperatures: Sequence[float]) -> list[Picture]:
    """Every prompt at every seed and temperature, with different file names.

    Raises:  DataError for an empty prompt.
    """
    pictures: list[Picture] = []
    groups: set[str] = set()
    for number, prompt in enumerate(dict.fromkeys(map(printable, prompts)), 1):
        if not prompt.strip():
            raise DataError(f'prompt {number} is empty; describe a picture, such as "a red fox".')
        group = base = re.sub(r"\W+", "-", prompt.lower()).strip("-_")[:40].strip("-_") or "picture"
        while group in groups:
            group = f"{base}-{number}"
            number += 1
        groups.add(group)
        for seed in seeds:
            pictures += [Picture(prompt, seed, t, f"{group}-t{t:g}-s{seed}", group) for t in temperatures]
    return pictures


class DrawingModels(NamedTuple):
    """An image tokenizer, an LLM that draws its tokens, and the number format of their computation."""

    tokenizer: V2FlowTokenizer
    llm: DrawingLM
    dtype: torch.dtype


def load_models(
    tokenizer: str | None,
    llm: str | None,
    device: str = "auto",
    dtype: str = "auto",
    *,
    decoder: str | None = None,
    option: str = "--tokenizer",
) -> DrawingModels:
    """Both models from folders or hub ids, on one device; None is the embedded one.

    Args:    option, with which the user names the tokenizer, for messages.
    Raises:  ModelError for a model that is missing, and for an LLM that draws tokens of another image tokenizer.
    """
    target = pick_device(device)
    number_format = pick_dtype(dtype, target)
    image_tokenizer = V2FlowTokenizer.from_pretrained(tokenizer, decoder=decoder).to(target)
    drawing_lm = DrawingLM.from_pretrained(llm, target, number_format)
    drawing_lm.vocabulary.check_tokenizer(image_tokenizer.token_digest, drawing_lm.name, f"{option} FOLDER")
    return DrawingModels(image_tokenizer, drawing_lm, number_format)


def model_digests(llm: DrawingLM, image_tokenizer: V2FlowTokenizer) -> dict[str, str]:
    """The digests of the models. Compute them once for all pictures: this reads every weight."""
    models = {"tokenizer_digest": image_tokenizer.token_digest, "decoder_digest": image_tokenizer.digest}
    return models | {"llm_digest": llm.digest}


def about(picture: Picture, settings: Settings, models: Mapping[str, str]) -> dict[str, Any]:
    """Everything needed to draw the picture again, for the PNG's metadata and the JSONL.

    Args:  models, see ``model_digests``.
    """
    record = {"prompt": picture.prompt, "seed": picture.seed, "temperature": picture.temperature}
    return record | asdict(settings) | dict(models)


def about_grid(record: Mapping[str, Any], temperatures: Sequence[float], seeds: Sequence[int]) -> dict[str, Any]:
    """What stands in a grid, given the ``record`` of one of its pictures: what they share, and its columns and rows."""
    shared = {key: value for key, value in record.items() if key not in ("seed", "temperature")}
    return shared | {"temperatures": list(temperatures), "seeds": list(seeds)}


def draw_images(
    llm: DrawingLM,
    image_tokenizer: V2FlowTokenizer,
    pictures: Sequence[Picture],
    settings: Settings,
    dtype: torch.dtype = torch.float32,
    tick: Callable[[], None] = lambda: None,
) -> list[tuple[torch.Tensor, Image.Image]]:
    """Token ids (L,) on the CPU and image of each of ``pictures``, drawn as one batch; ``tick`` as in ``draw``."""
    token_ids = llm.generate(
        [p.prompt for p in pictures],
        seeds=[p.seed for p in pictures],
        temperature=[p.temperature for p in pictures],
        top_k=settings.top_k,
        top_p=settings.top_p,
        guidance_scale=settings.llm_guidance_scale,
        num_tokens=settings.num_tokens,
        tick=tick,
    )
    lengths = (token_ids != STOPPED).sum(1).tolist()
    sampling = {name: getattr(settings, name) for name in SAMPLING_OPTIONS.values()}
    results: dict[int, tuple[torch.Tensor, Image.Image]] = {}
    with inference(image_tokenizer.device, dtype):
        for length in sorted(set(lengths)):
            rows = [i for i, row_length in enumerate(lengths) if row_length == length]
            seeds = [pictures[i].seed for i in rows]
            images = image_tokenizer.decode(token_ids[rows, :length], seeds=seeds, **sampling)
            for i, image in zip(rows, to_pil(images)):
                results[i] = token_ids[i, :length].cpu(), image
    return [results[i] for i in range(len(pictures))]


def draw_pictures(
    llm: DrawingLM,
    image_tokenizer: V2FlowTokenizer,
    pictures: Sequence[Picture],
    out: Path,
    settings: Settings,
    *,
    batch_size: int = 16,
    dtype: torch.dtype = torch.float32,
    save_tokens: bool = False,
    tick: Callable[[int], None] = lambda advance: None,
) -> Iterator[tuple[Picture, Image.Image]]:
    """Draw ``pictures`` in batches, write them as ``out``/NAME.png, and yield each with its image."""
    models = model_digests(llm, image_tokenizer)
    for first in range(0, len(pictures), batch_size):
        batch = pictures[first : first + batch_size]
        results = draw_images(llm, image_tokenizer, batch, settings, dtype)
        if save_tokens:
            ids_by_name = {p.name: ids.numpy() for p, (ids, _) in zip(batch, results)}
            _save_tokens(out, ids_by_name, image_tokenizer, llm.length(settings.num_tokens))
        for picture, (_, image) in zip(batch, results):
            write_png(out / f"{picture.name}.png", image, about(picture, settings, models))
            yield picture, image
        tick(len(batch))


def write_png(path: Path, image: Image.Image, record: dict[str, Any]) -> None:
    """Write ``image`` with ``record`` as text metadata; None values are left out."""
    info = PngInfo()
    for key, value in _texts(record).items():
        info.add_text(key, value)
    write_bytes(path, png_bytes(image, info))


def is_drawn_as(path: Path, record: dict[str, Any]) -> bool:
    """True if the metadata of the picture ``path`` equals ``record``; False if there is no such file.

    Raises:  DataError for any other file.
    """
    if not path.exists():
        return False
    with foreign_errors(f"{path}: exists, and is no picture", "Use --force to overwrite it.", DataError):
        with Image.open(path, formats=("PNG",)) as image:
            texts = {str(key): value for key, value in image.info.items() if str(key).startswith("v2flow:")}
    expected = _texts(record)
    different = sorted(key for key in expected.keys() | texts.keys() if expected.get(key) != texts.get(key))
    if different:
        settings = ", ".join(f"{key.removeprefix('v2flow:')} {texts.get(key)}" for key in different)
        raise DataError(f"{path}: exists, drawn with {settings}. Use --force to draw it again, or another -o.")
    return True


def _texts(record: dict[str, Any]) -> dict[str, str]:
    return {f"v2flow:{key}": str(value) for key, value in record.items() if value is not None}


class PictureList:
    """``generated.jsonl``: a line {"path": ..., "prompt": ..., "seed": ..., ...} for every picture in a folder."""

    def __init__(self, folder: Path, redrawn: Collection[str] = ()) -> None:
        """Read the list, and remove pictures that will be ``redrawn`` from it.  Raises: DataError."""
        self.path = folder / RECORD
        lines: dict[str, str] = {}
        if self.path.exists():
            content = self.path.read_bytes()
            with foreign_errors(f"{self.path}: a line is no record of a picture", "Remove it.", DataError):
                lines = {json.loads(line)["path"]: line for line in whole_lines(content)}
            if not content.endswith(b"\n") or lines.keys() & set(redrawn):
                lines = {name: line for name, line in lines.items() if name not in redrawn}
                write_bytes(self.path, "".join(f"{line}\n" for line in lines.values()).encode())
        self.paths = set(lines)

    def add(self, name: str, record: dict[str, Any]) -> None:
        """Append a picture, unless it is listed already."""
        if name in self.paths:
            return
        self.paths.add(name)
        append_line(self.path, json.dumps({"path": name, **record}, ensure_ascii=False))


def figure(
    pictures: Sequence[Picture],
    images: Sequence[Image.Image],
    temperatures: Sequence[float],
    seeds: Sequence[int],
) -> Image.Image:
    """The pictures of one prompt as in Figure 6: a row for each seed, a column for each temperature, with labels."""
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


def check_tokens_folder(out: Path, image_tokenizer: V2FlowTokenizer, length: int) -> None:
    """Raises: DataError if ``out`` holds the tokens of another tokenizer."""
    existing = TokenManifest.load(out)
    if existing is not None and not existing.same_tokens(_manifest(image_tokenizer, length)):
        raise DataError(f"{out}/manifest.json belongs to tokens of another tokenizer. Use another -o, or --force.")


def _manifest(image_tokenizer: V2FlowTokenizer, length: int) -> TokenManifest:
    size = image_tokenizer.grid_of(length)
    return TokenManifest(image_tokenizer.token_digest, size, image_tokenizer.config.codebook_size, length, {})


def _save_tokens(out: Path, ids: dict[str, np.ndarray], image_tokenizer: V2FlowTokenizer, length: int) -> None:
    """Write one ``.npy`` per picture beside its PNG; ``manifest.json`` lists those of ``length`` tokens."""
    manifest = _manifest(image_tokenizer, length)
    existing = TokenManifest.load(out)
    if existing is not None and existing.same_tokens(manifest):
        manifest.files.update(existing.files)
    for name, row in ids.items():
        save_token_ids(out / f"{name}.npy", row, manifest.codebook_size)
        if len(row) == length:
            manifest.files[name] = 1
    if manifest.files:
        manifest.save(out)
