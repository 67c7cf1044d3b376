"""A whole bench: speed, then every system on every photo; its record as JSON, its single figures as CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from v2flow_cli.bench import metrics
from v2flow_cli.bench.codecs import available_codecs
from v2flow_cli.bench.evaluate import Result, evaluate
from v2flow_cli.bench.published import PUBLISHED, SOURCE
from v2flow_cli.bench.systems import autoencoder_system, codec_system, tokenizer_system
from v2flow_cli.bench.throughput import Speed, measure_speed
from v2flow_cli.errors import DataError
from v2flow_cli.tokenizer import V2FlowTokenizer


@dataclass(frozen=True)
class Bench:
    """What a bench found.  main_systems: the rows that are the tokenizer itself; notes: what was left out."""

    result: Result
    main_systems: tuple[str, ...]
    weights_digest: str
    speed: Speed | None
    notes: tuple[str, ...]


def run_bench(
    tokenizer: V2FlowTokenizer,
    photos: Iterable[tuple[str, Image.Image]],
    *,
    size: int | None = None,
    guidance_scales: Sequence[float | None] = (None,),
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    lpips: metrics.Lpips | None = None,
    lpips_note: str = "not measured",
    with_codecs: bool = True,
    with_speed: bool = True,
    keep: int = 0,
    tick: Callable[[int], None] = lambda advance: None,
    **settings: Any,
) -> Bench:
    """The tokenizer at each guidance scale, its autoencoder, and codecs at as many bytes, on the same photos.

    Args:    photos, (name, RGB image) with distinct names, read as they are needed; size in pixels (default:
             the model's); a scale of None is the model's own; keep, images to hold for the report;
             ``settings`` (num_mask_steps, solver, ...) go to ``decode``.
    Raises:  DataError for a size that does not fit the tokenizer, or when there is no photo.
    """
    size = size or tokenizer.config.image_size
    try:
        tokens = tokenizer.num_tokens(size, size)
    except ValueError as error:
        raise DataError(f"--res {size}: {error}.") from None
    if size < metrics.SSIM_WINDOW:
        raise DataError(f"--res {size}: SSIM needs at least {metrics.SSIM_WINDOW} pixels a side.")
    budget = metrics.token_bytes(tokens, tokenizer.config.codebook_size)
    stream = iter(photos)
    first = list(itertools.islice(stream, batch_size))
    speed = None
    if with_speed and first:  # before anything else has filled the memory
        speed = _speed(tokenizer, first, size, batch_size, dtype, {"guidance_scale": guidance_scales[0], **settings})
    systems = [
        tokenizer_system(tokenizer, _name(scale), budget, dtype=dtype, guidance_scale=scale, **settings)
        for scale in guidance_scales
    ]
    main_systems = tuple(system.name for system in systems)
    systems.append(autoencoder_system(tokenizer, dtype=dtype))
    notes: list[str] = [] if lpips else [lpips_note]
    if with_codecs:
        codecs, missing = available_codecs()
        systems += [codec_system(codec, budget) for codec in codecs]
        notes += missing
    result = evaluate(
        tokenizer,
        itertools.chain(first, stream),
        systems,
        size=size,
        batch_size=batch_size,
        dtype=dtype,
        seed=seed,
        lpips=lpips,
        lpips_note=lpips_note,
        keep=keep,
        tick=tick,
    )
    return Bench(result, main_systems, tokenizer.digest, speed, tuple(notes))


def _name(guidance_scale: float | None) -> str:
    return "v2flow" if guidance_scale is None else f"v2flow, guidance {guidance_scale:g}"


def _speed(
    tokenizer: V2FlowTokenizer,
    photos: Sequence[tuple[str, Image.Image]],
    size: int,
    batch_size: int,
    dtype: torch.dtype,
    settings: Mapping[str, Any],
) -> Speed:
    """Speed on one full batch; the photos are repeated where they are fewer."""
    images = [tokenizer.image_processor.preprocess_one(image, size) for _, image in photos]
    batch = torch.stack(list(itertools.islice(itertools.cycle(images), batch_size)))
    return measure_speed(tokenizer, batch, dtype=dtype, **settings)


def as_record(bench: Bench) -> dict[str, Any]:
    """The bench as plain JSON values with stable, unit-bearing keys; ``as_csv`` has the single images."""
    result = bench.result
    protocol = result.protocol
    pixels = protocol.image_size**2
    return {
        "protocol": protocol.record(),
        "weights_digest": bench.weights_digest,
        "tokens_per_image": result.tokens_per_image,
        "measured": [
            {
                "system": row.system,
                "settings": dict(row.settings),
                "bytes_per_image": row.bytes_per_image,
                "bits_per_pixel": row.bits_per_pixel,
                **_estimate("psnr_db", row.psnr),
                **_estimate("ssim", row.ssim),
                **_estimate("lpips", row.lpips),
            }
            for row in result.rows
        ],
        "published": {
            "source": SOURCE,
            "rows": [dataclasses.asdict(row) for row in PUBLISHED.get(protocol.image_size, ())],
        },
        "codebook": {
            **dataclasses.asdict(result.codebook),
            "entropy_bits_per_pixel": result.codebook.entropy_bits * result.tokens_per_image / pixels,
        },
        "speed": dataclasses.asdict(bench.speed) if bench.speed else None,
        "notes": list(bench.notes),
    }


def _estimate(name: str, value: metrics.Estimate | None) -> dict[str, float | None]:
    """Mean and half-width; null where not measured, or infinite (PSNR of equal images)."""
    numbers = (value.mean, value.ci95) if value else (math.nan, math.nan)
    mean, ci95 = (number if math.isfinite(number) else None for number in numbers)
    return {name: mean, f"{name}_ci95": ci95}


def as_csv(bench: Bench) -> str:
    """One line an image and system, under a heading; an empty field was not measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["protocol", "image", "system", "bytes", "psnr_db", "ssim", "lpips"])
    key = bench.result.protocol.key
    for f in bench.result.images:
        writer.writerow([key, f.image, f.system, f.bytes, f"{f.psnr:.6g}", f"{f.ssim:.6g}", f.lpips])
    return text.getvalue()
