"""Figures of a drawing LLM: its loss on visual tokens, and whether a caption makes its own image more likely."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from v2flow_cli.errors import DataError, ModelError, TokenFileError, foreign_errors
from v2flow_cli.llm.loss import labelled_losses
from v2flow_cli.llm.pairs import encode_photos
from v2flow_cli.llm.sample import DrawingLM
from v2flow_cli.llm.sequences import caption_ids, collate, sample
from v2flow_cli.store.not_taken import NotTaken
from v2flow_cli.store.stream import SampleStream
from v2flow_cli.store.token_file import TokenSample
from v2flow_cli.store.token_sets import is_token_set, token_samples, token_set_manifest
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.training.objectives.drawing import TOKEN_COUNTS


@dataclass(frozen=True)
class LLMFigures:
    """Losses and entropies in nats a visual token; counts and shares of photos."""

    photos: int
    tokens: int  # visual ones, of all photos
    visual_loss: float  # under the photo's own caption
    other_caption_loss: float  # under another photo's
    no_caption_loss: float  # under the empty prompt
    ln_codebook_size: float  # a uniform guess
    unigram_entropy: float  # of the measured ids, by the frequencies of the codes among them
    unigram_trained: float | None  # the measured ids by the frequencies of the training set
    matched_share: float  # more likely under the own caption than under the other; a tie is half; chance is 0.5
    matched_ci95: float  # half-width


def read_captioned(
    sources: Sequence[str],
    tokenizer: V2FlowTokenizer,
    length: int,
    limit: int | None,
    tick: Callable[[int], None],
    not_taken: NotTaken | None = None,
) -> list[TokenSample]:
    """The captioned images of token sets, tars or folders; photos are encoded at ``length``.

    Images without a caption and other files are added to ``not_taken``.
    Raises:  DataError if fewer than two images have a caption, or a photo cannot be read; TokenFileError for tokens of
             another tokenizer.
    """
    left = NotTaken() if not_taken is None else not_taken
    pairs: list[TokenSample] = []
    for pair in (pair for source in sources for pair in _read(source, tokenizer, length, left)):
        if not pair.captions:
            left.add(pair.key, "images", "they have no caption")
            continue
        pairs.append(pair)
        tick(1)
        if len(pairs) == limit:
            break
    if len(pairs) < 2:
        raise DataError(
            f"{', '.join(sources)}: {len(pairs)} captioned images; expected at least 2. Captions are KEY.txt beside "
            "KEY.jpg, in a folder or a WebDataset tar."
        )
    return pairs


def _read(source: str, tokenizer: V2FlowTokenizer, length: int, not_taken: NotTaken) -> Iterator[TokenSample]:
    if is_token_set(source):
        manifest = token_set_manifest(source)
        manifest.check_tokenizer(tokenizer.token_digest, source)
        manifest.check_square(source)
        if not tokenizer.flexible and manifest.tokens_per_image != length:
            raise TokenFileError(
                f"{source}: {manifest.tokens_per_image} tokens an image, but the LLM draws {length}. Encode them "
                f"with --tokens {length}."
            )
        yield from token_samples(source)
        return
    stream = SampleStream([source], seed=0)
    photos = stream.epoch()
    while batch := list(itertools.islice(photos, 8)):
        for photo, token_ids in zip(batch, encode_photos(tokenizer, batch, length)):
            yield TokenSample(photo.key, photo.captions, token_ids)
    not_taken.merge(stream.not_taken)
    for failure in stream.failures:
        not_taken.add(failure.name, "samples", failure.reason)


def measure_llm(
    llm: DrawingLM,
    pairs: Sequence[TokenSample],
    *,
    batch_size: int = 8,
    seed: int = 0,
    tick: Callable[[int], None] = lambda advance: None,
) -> LLMFigures:
    """Losses of ``pairs``, at least two, each under its first caption, under that of another one, and under none.

    The other one comes from ``seed``: a random cycle through all of them, so that none is its own.
    """
    order = np.random.default_rng(seed).permutation(len(pairs))
    other = {int(i): int(j) for i, j in zip(order, np.roll(order, -1))}
    own = [pair.captions[0] for pair in pairs]
    losses = [
        caption_losses(llm, captions, pairs, batch_size, tick)
        for captions in (own, [own[other[i]] for i in range(len(pairs))], [""] * len(pairs))
    ]
    ids = np.concatenate([pair.token_ids for pair in pairs])
    share = float(((losses[0] < losses[1]) + 0.5 * (losses[0] == losses[1])).double().mean())
    counts, train_counts = np.bincount(ids, minlength=llm.vocabulary.codebook_size), training_counts(llm)
    return LLMFigures(
        photos=len(pairs),
        tokens=len(ids),
        visual_loss=float(losses[0].sum()) / len(ids),
        other_caption_loss=float(losses[1].sum()) / len(ids),
        no_caption_loss=float(losses[2].sum()) / len(ids),
        ln_codebook_size=math.log(llm.vocabulary.codebook_size),
        unigram_entropy=_cross_entropy(ids, counts / len(ids)),
        unigram_trained=(
            None if train_counts is None else _cross_entropy(ids, (train_counts + 1) / (train_counts + 1).sum())
        ),
        matched_share=share,
        matched_ci95=1.96 * math.sqrt(share * (1 - share) / len(pairs)),
    )


@torch.inference_mode()
def caption_losses(
    llm: DrawingLM,
    captions: Sequence[str],
    pairs: Sequence[TokenSample],
    batch_size: int,
    tick: Callable[[int], None] = lambda advance: None,
) -> torch.Tensor:
    """-log p of each image's visual tokens given its caption, in nats an image, (N,) float64."""
    vocabulary, model = llm.vocabulary, llm.model
    parts = []
    for first in range(0, len(pairs), batch_size):
        part = slice(first, first + batch_size)
        batch = collate(
            [
                sample(vocabulary, caption_ids(llm.text_tokenizer, caption), pair.token_ids)
                for caption, pair in zip(captions[part], pairs[part])
            ],
            pad_id=0,
        )
        input_ids, labels = batch["input_ids"].to(model.device), batch["labels"].to(model.device)
        out = labelled_losses(model, model.get_output_embeddings(), input_ids, labels)
        visual = out.losses.double() * vocabulary.is_visual(out.targets)
        sums = torch.zeros(len(batch["labels"]), dtype=torch.float64, device=model.device)
        parts.append(sums.index_add_(0, out.rows, visual).cpu())
        tick(len(sums))
    return torch.cat(parts)


def training_counts(llm: DrawingLM) -> np.ndarray | None:
    """How often each code occurs in the training data, (K,); None if the LLM's folder has no counts.

    Raises:  ModelError for a damaged file.
    """
    path = Path(llm.name, TOKEN_COUNTS)
    if not path.is_file():
        return None
    with foreign_errors(f"{path}: cannot be read", "Remove it."):
        counts = np.load(path, allow_pickle=False)
    if counts.shape != (llm.vocabulary.codebook_size,):
        raise ModelError(f"{path}: shape is {counts.shape}; expected {(llm.vocabulary.codebook_size,)}. Remove it.")
    return counts.astype(np.float64)


def _cross_entropy(ids: np.ndarray, probs: np.ndarray) -> float:
    return float(-np.log(probs[ids]).mean())
