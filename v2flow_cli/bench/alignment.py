"""Visual tokens among the words of the LLM (Figure 1b): a plot of a plane, and three figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from v2flow_cli.errors import DataError, ModelError
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.preprocess import image_to_tensor

POINTS = 2000  # of each kind, a random choice if there are more
WORD_COLOUR, TOKEN_COLOUR = (150, 150, 150), (208, 72, 40)


@dataclass(frozen=True)
class Alignment:
    """Visual tokens of one tokenizer and the words, in the LLM's embedding space.  planes: (N, 2) and (M, 2)."""

    name: str
    has_vocabulary: bool
    tokens: int  # visual tokens compared
    norm_ratio: float  # median norm of a visual token over that of a word
    nearest_word_cosine: float  # mean over visual tokens
    word_nearest_cosine: float  # mean over words, to the nearest other word
    energy_distance: float  # in [0, 1]: 0 for equal distributions, 1 for disjoint ones
    words_plane: np.ndarray
    tokens_plane: np.ndarray


def word_table(tokenizer: V2FlowTokenizer) -> Tensor:
    """The words (V, D) of the tokenizer's vocabulary, in the LLM's space.  Raises: ModelError if it has none."""
    if tokenizer.vocabulary is None:
        raise ModelError(
            "the tokenizer has no vocabulary; name one with a vocabulary first, and this one as a second --model."
        )
    return tokenizer.vocabulary.codebook_to_llm(tokenizer.vocabulary.table.float())


@torch.no_grad()
def photo_tokens(
    tokenizer: V2FlowTokenizer, photos: Iterable[tuple[str, Image.Image]], words: Tensor, name: str
) -> Tensor:
    """The codes (N, D) of every token of the photos.  Raises: DataError without photos; ModelError for another D."""
    codebook = tokenizer.codebook
    if codebook.shape[1] != words.shape[1]:
        raise ModelError(
            f"{name}: its codes are {codebook.shape[1]} wide, the words {words.shape[1]}; they can be compared only "
            f"if quantizer.code_size is {words.shape[1]}."
        )
    size = tokenizer.config.image_size
    ids = [tokenizer.encode(image_to_tensor(image, size)[None])[0] for _, image in photos]
    if not ids:
        raise DataError("bench alignment: no photo.")
    return codebook[torch.cat(ids)]


def align(name: str, has_vocabulary: bool, tokens: Tensor, words: Tensor, seed: int) -> Alignment:
    """Compare visual tokens (N, D) with words (V, D); the plane is that of their first two principal components."""
    generator = torch.Generator().manual_seed(seed)
    tokens, words = tokens.float().cpu(), words.float().cpu()
    some_tokens, some_words = _sample(tokens, generator), _sample(words, generator)
    both = torch.cat([some_words, some_tokens])
    _, _, axes = torch.linalg.svd(both - both.mean(0), full_matrices=False)
    plane = ((both - both.mean(0)) @ axes[:2].T).numpy()
    return Alignment(
        name=name,
        has_vocabulary=has_vocabulary,
        tokens=len(tokens),
        norm_ratio=float(tokens.norm(dim=1).median() / words.norm(dim=1).median()),
        nearest_word_cosine=_nearest_cosine(some_tokens, words, 1),
        word_nearest_cosine=_nearest_cosine(some_words, words, 2),  # the nearest word is the word itself
        energy_distance=energy_distance(some_tokens, some_words),
        words_plane=plane[: len(some_words)],
        tokens_plane=plane[len(some_words) :],
    )


def energy_distance(first: Tensor, second: Tensor) -> float:
    """(2 E|X - Y| - E|X - X'| - E|Y - Y'|) / 2 E|X - Y| of two samples (N, D), (M, D).

    Pairs of a point with itself are left out.
    """
    across = torch.cdist(first, second).mean()
    within = sum(torch.cdist(x, x).sum() / (len(x) * max(1, len(x) - 1)) for x in (first, second))
    return float((2 * across - within) / (2 * across)) if across > 0 else 0.0


def _nearest_cosine(points: Tensor, words: Tensor, rank: int) -> float:
    """Mean over ``points`` of the cosine with their ``rank``-th nearest word."""
    unit = torch.nn.functional.normalize(words, dim=1)
    chunks = torch.nn.functional.normalize(points, dim=1).split(256)
    return float(torch.cat([(chunk @ unit.T).topk(rank, dim=1).values[:, -1] for chunk in chunks]).mean())


def _sample(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:POINTS]]


def draw_planes(alignments: Sequence[Alignment]) -> Image.Image:
    """One panel per tokenizer: words in grey, visual tokens in red, on the plane of their principal components."""
    side, top, gap = 480, 64, 12
    sheet = Image.new("RGB", (len(alignments) * (side + gap) + gap, top + side + gap), "white")
    pen, font = ImageDraw.Draw(sheet, "RGBA"), ImageFont.load_default(15)
    for column, one in enumerate(alignments):
        left = gap + column * (side + gap)
        kind = "with vocabulary resampler" if one.has_vocabulary else "without"
        pen.text((left, 6), f"{one.name[-40:]}: {kind}", fill="black", font=font)
        pen.text((left, 26), "words of the LLM", fill=WORD_COLOUR, font=font)
        pen.text((left + 140, 26), "visual tokens", fill=TOKEN_COLOUR, font=font)
        pen.text((left, 44), f"energy distance {one.energy_distance:.3f}", fill="black", font=font)
        pen.rectangle((left, top, left + side, top + side), outline=(200, 200, 200))
        points = np.concatenate([one.words_plane, one.tokens_plane])
        low, high = points.min(0), points.max(0)
        scale = (side - 16) / max(float((high - low).max()), 1e-12)
        offset = (side - (high - low) * scale) / 2
        for plane, colour in ((one.words_plane, WORD_COLOUR), (one.tokens_plane, TOKEN_COLOUR)):
            for x, y in (plane - low) * scale + offset:
                pen.ellipse((left + x - 2, top + y - 2, left + x + 2, top + y + 2), fill=(*colour, 110))
    return sheet
