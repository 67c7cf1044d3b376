"""``bench draw``: how well a drawing LLM follows its prompts, and whether it copies its training pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from v2flow_cli.bench.judge import Judge, Verdict, real_pictures, whole_object
from v2flow_cli.bench.prompts import KINDS, Prompt
from v2flow_cli.bench.references import Reference, nouns_with_colours
from v2flow_cli.jobs.generate import Settings, draw_pictures, plan_pictures
from v2flow_cli.llm.sample import DrawingLM
from v2flow_cli.runtime.device import inference
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.preprocess import to_uint8

COPIES = 200  # training pictures, after the tokenizer, that show how near copies would be
PARTS = ("all", "noun", "noun_in_5", "colour", "count", "place")
Z95 = 1.959964


@dataclass(frozen=True)
class Share:
    """A share of trials and its 95% interval (Wilson's)."""

    share: float
    low: float
    high: float
    trials: int


def share_of(right: Sequence[bool], trials: int | None = None) -> Share:
    """The share of true values.  ``trials``: the number of independent ones (default: all).

    Raises: ValueError for no values.
    """
    if not right:
        raise ValueError("no trials")
    p, n = sum(right) / len(right), trials or len(right)
    middle, spread = p + Z95**2 / (2 * n), Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    low, high = ((middle + sign * spread) / (1 + Z95**2 / n) for sign in (-1, 1))
    return Share(p, max(0.0, low), min(1.0, high), n)


@dataclass(frozen=True)
class KindFigures:
    """One kind of prompt: the shares that the judge finds right in drawn pictures, and in real ones.

    drawn, real, real_tokens: by ``PARTS``; real_tokens are real pictures after the tokenizer, with as many tokens as
    the LLM draws. The trials of ``drawn`` are prompts, because pictures of one prompt are not independent.
    """

    kind: str
    prompts: int
    pictures: int
    drawn: dict[str, Share]
    real: dict[str, Share]
    real_tokens: dict[str, Share]


@dataclass(frozen=True)
class Spread:
    """Distances (1 - cosine) of some pictures to the nearest training picture."""

    count: int
    percentile_5: float
    median: float
    percentile_95: float


@dataclass(frozen=True)
class Copies:
    """Distances of drawn pictures to training pictures, beside those of held-out pictures and of copies.

    held_out, held_out_tokens: pictures without training, before and after the tokenizer; copies: training pictures
    after the tokenizer. nearer: share of the drawn pictures that are nearer than 95% of held_out_tokens; without
    copying it would be 5%.
    """

    drawn: Spread
    held_out: Spread
    held_out_tokens: Spread
    copies: Spread
    nearer: Share


@dataclass(frozen=True)
class Drawing:
    """One drawn picture; pixels (H, W, 3) uint8."""

    prompt: Prompt
    file: Path
    pixels: np.ndarray
    verdict: Verdict


@dataclass(frozen=True)
class DrawBench:
    """The result of ``measure_drawing``; copies is None if no picture was held out."""

    drawings: tuple[Drawing, ...]
    figures: tuple[KindFigures, ...]
    copies: Copies | None


def measure_drawing(
    llm: DrawingLM,
    tokenizer: V2FlowTokenizer,
    prompts: Sequence[Prompt],
    judge: Judge,
    training: Judge,
    held_out: Sequence[Reference],
    out: Path,
    settings: Settings,
    *,
    temperature: float,
    seeds: Sequence[int],
    per_kind: int,
    batch_size: int = 16,
    dtype: torch.dtype = torch.float32,
    tick: Callable[[int], None] = lambda advance: None,
) -> DrawBench:
    """Draw every prompt at every seed into PNG files in ``out``, and judge them and real pictures.

    Args:    training, the LLM's training pictures in the judge's space; held_out, pictures that neither the LLM nor the
             judge has; per_kind, the most real pictures of each kind of prompt for the judge.
    """
    by_text = {prompt.text: prompt for prompt in prompts}
    plan = plan_pictures(list(by_text), seeds, [temperature])
    results = draw_pictures(llm, tokenizer, plan, out, settings, batch_size=batch_size, dtype=dtype, tick=tick)
    pictures = [(picture, np.asarray(image)) for picture, image in results]
    pairs = [(by_text[picture.prompt], pixels) for picture, pixels in pictures]
    verdicts = judge.verdicts(pairs)

    def through_tokens(originals: Sequence[np.ndarray]) -> list[np.ndarray]:
        length = llm.length(settings.num_tokens)
        return reconstruct(tokenizer, originals, length, batch_size=batch_size, dtype=dtype)

    nouns = list(nouns_with_colours(judge.references, least=1))
    kinds = {prompt.kind for prompt in prompts}
    real = [pair for pair in real_pictures(held_out, nouns, per_kind, seed=0) if pair[0].kind in kinds]
    real_prompts = [prompt for prompt, _ in real]
    reconstructions = through_tokens([pixels for _, pixels in real])
    figures = summarise(
        [(prompt, verdict) for (prompt, _), verdict in zip(pairs, verdicts)],
        list(zip(real_prompts, judge.verdicts(real))),
        list(zip(real_prompts, judge.verdicts(list(zip(real_prompts, reconstructions))))),
    )
    copies = None
    if held_out:
        others = [reference.pixels() for reference in held_out[:COPIES]]
        copies = measure_copies(judge, training, [pixels for _, pixels in pictures], others, through_tokens)
    drawings = tuple(
        Drawing(prompt, out / f"{picture.name}.png", pixels, verdict)
        for (picture, pixels), (prompt, _), verdict in zip(pictures, pairs, verdicts)
    )
    return DrawBench(drawings, tuple(figures), copies)


def summarise(
    drawn: Sequence[tuple[Prompt, Verdict]],
    real: Sequence[tuple[Prompt, Verdict]],
    real_tokens: Sequence[tuple[Prompt, Verdict]],
) -> list[KindFigures]:
    """The figures of every kind of prompt; prompts of kind "other" have none."""
    figures = []
    for kind in KINDS:
        of_kind = [(prompt, verdict) for prompt, verdict in drawn if prompt.kind == kind]
        if of_kind:
            prompts = len({prompt.text for prompt, _ in of_kind})
            figures.append(
                KindFigures(
                    kind,
                    prompts,
                    len(of_kind),
                    _parts(of_kind, prompts),
                    _parts([pair for pair in real if pair[0].kind == kind]),
                    _parts([pair for pair in real_tokens if pair[0].kind == kind]),
                )
            )
    return figures


def _parts(pairs: Sequence[tuple[Prompt, Verdict]], trials: int | None = None) -> dict[str, Share]:
    values = {part: [v.right[part] for _, v in pairs if part in v.right] for part in PARTS}
    return {part: share_of(right, trials) for part, right in values.items() if right}


def measure_copies(
    judge: Judge,
    training: Judge,
    drawn: Sequence[np.ndarray],
    held_out: Sequence[np.ndarray],
    through_tokens: Callable[[Sequence[np.ndarray]], list[np.ndarray]],
) -> Copies:
    """Distances to the pictures of ``training``; ``COPIES`` of them, evenly spaced, serve as copies.

    Args:    through_tokens, pictures to tokens and back.
    """
    step = max(1, len(training.references) // COPIES)
    originals = [reference.pixels() for reference in training.references[::step]]

    def distances(pictures: Sequence[np.ndarray]) -> torch.Tensor:
        return training.distances(judge.embed(whole_object(picture) for picture in pictures))

    to_drawn, copies = distances(drawn), distances(through_tokens(originals))
    others, others_tokens = distances(held_out), distances(through_tokens(held_out))
    threshold = float(torch.quantile(others_tokens, 0.05))
    nearer = share_of([float(value) < threshold for value in to_drawn])
    return Copies(_spread(to_drawn), _spread(others), _spread(others_tokens), _spread(copies), nearer)


def _spread(distances: torch.Tensor) -> Spread:
    low, middle, high = torch.quantile(distances, torch.tensor([0.05, 0.5, 0.95])).tolist()
    return Spread(len(distances), low, middle, high)


def reconstruct(
    tokenizer: V2FlowTokenizer,
    pictures: Sequence[np.ndarray],
    num_tokens: int,
    *,
    batch_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> list[np.ndarray]:
    """Pictures as ``num_tokens`` tokens and back, at the tokenizer's image size: the best that an LLM could draw.

    A picture that is not square gets white margins, because the centre crop would cut it.
    """
    results: list[np.ndarray] = []
    size = tokenizer.config.image_size
    for first in range(0, len(pictures), batch_size):
        batch = [ImageOps.pad(Image.fromarray(p), (size, size), color="white") for p in pictures[first:][:batch_size]]
        images = torch.stack([tokenizer.image_processor.preprocess_one(image) for image in batch])
        with inference(tokenizer.device, dtype):
            ids = tokenizer.encode(images.to(tokenizer.device), num_tokens, refine_steps=0)  # as an LLM learns them
            decoded = tokenizer.decode(ids, height=size, width=size, seeds=list(range(first, first + len(batch))))
        results += list(to_uint8(decoded).numpy())
    return results
