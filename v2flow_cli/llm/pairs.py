"""The training data as a stream: captions with the tokens that ``encode`` wrote, or with photos encoded on the fly."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from v2flow_cli.errors import DataError
from v2flow_cli.llm.sequences import caption_ids, sample
from v2flow_cli.llm.vocabulary import VisualVocabulary
from v2flow_cli.recipe.schema import TokenPairs
from v2flow_cli.store.images import open_image
from v2flow_cli.store.stream import Sample, SampleStream
from v2flow_cli.store.token_file import TokenSample
from v2flow_cli.store.token_sets import token_samples, token_set_manifest
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.prefix import doublings
from v2flow_cli.tokenizer.preprocess import image_to_tensor


@dataclass(frozen=True)
class Part:
    """A process's share of the samples: batches rank, rank + ranks, ... from sample ``start`` on."""

    start: int = 0
    batch: int = 1  # samples
    rank: int = 0
    ranks: int = 1


class Pair(NamedTuple):
    """A caption and an image, and which of them is the answer."""

    caption: str
    image: TokenSample | Sample
    length: int | None  # tokens kept, if the vocabulary is flexible
    ended: bool  # True if the picture ends after them
    to_text: bool
    seed: int | None  # of noise and labels; None without noise and with all labels


CAPTION_CACHE = 2**18  # tokenised captions in memory, about 300 bytes each


class _Window:
    """Samples of token sets in memory, without order; their ids are rows of one array.

    Separate arrays would be placed in the memory of a step's freed tensors, which then could not be used again.
    """

    def __init__(self, token_sets: Sequence[str], size: int) -> None:
        """Of at most ``size`` samples."""
        manifests = [token_set_manifest(folder) for folder in token_sets]
        shape = min(size, sum(m.count for m in manifests)), max(m.tokens_per_image for m in manifests)
        self._ids = np.empty(shape, dtype=np.min_scalar_type(max(m.codebook_size for m in manifests)))
        self._others: list[tuple[str, tuple[str, ...], int]] = []  # key, captions, and number of ids, of each row

    def __len__(self) -> int:
        return len(self._others)

    def __getitem__(self, row: int) -> TokenSample:
        key, captions, length = self._others[row]
        return TokenSample(key, captions, self._ids[row, :length].copy())

    def __setitem__(self, row: int, sample: TokenSample) -> None:
        """Replace the sample in ``row``, or add one in row ``len(self)``."""
        others = sample.key, sample.captions, len(sample.token_ids)
        self._others[row : row + 1] = [others]
        self._ids[row, : len(sample.token_ids)] = sample.token_ids


class Samples(torch.utils.data.IterableDataset):
    """A stream of samples (see ``sequences.sample``): input_ids and labels, each (T,) int64, and the image's key.

    Without ``held_out`` it is endless: every pass draws one of an image's captions, drops it with the recipe's
    probability, and shuffles, all from ``seed`` and the number of the pass. The n-th sample does not depend on the
    number of processes, so a resumed run continues exactly at ``part.start``. The images of a step share the draw of
    ``data.lengths`` and ``data.prefix_lengths``, because a short sequence beside a long one is padded to its length and
    costs as much. With ``held_out`` it is one pass in file order over the held-out images, each with its first caption.
    """

    def __init__(
        self,
        data: TokenPairs,
        text_tokenizer: PreTrainedTokenizerBase,
        vocabulary: VisualVocabulary,
        seed: int,
        held_out: bool = False,
        image_tokenizer: V2FlowTokenizer | None = None,
        output: str | None = None,
        step_size: int = 1,
    ) -> None:
        """``image_tokenizer`` encodes ``data.photos``; the folder ``output`` is not searched for them.

        Args:  step_size, images of an optimizer step over all processes.
        """
        self.data, self.text_tokenizer, self.vocabulary = data, text_tokenizer, vocabulary
        self.seed, self.held_out, self.image_tokenizer, self.step_size = seed, held_out, image_tokenizer, step_size
        self.part = Part()
        self._tokenised: dict[str, bytes] = {}  # uint32 ids by caption: a list of ints takes three times the memory
        self.photos = SampleStream(data.photos, seed=seed, output=output) if data.photos else None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        part = self.part
        numbered = enumerate(self._once() if self.held_out else self._endless())
        mine = (pair for n, pair in numbered if n >= part.start and n // part.batch % part.ranks == part.rank)
        while batch := list(itertools.islice(mine, part.batch)):
            for pair, token_ids in zip(batch, self._token_ids(batch)):
                words = self._words(pair.caption)
                token_ids = token_ids[: pair.length]
                options: dict[str, Any] = dict(
                    to_text=pair.to_text, train_on_prompt=self.data.train_on_prompt, ended=pair.ended
                )
                options |= self._noise(token_ids, pair.seed)
                yield {**sample(self.vocabulary, words, token_ids, **options), "key": pair.image.key}

    def _words(self, caption: str) -> list[int]:
        """Ids of a caption, cut to the recipe's limit; the first CAPTION_CACHE captions are tokenised once."""
        known = self._tokenised.get(caption)
        if known is not None:
            return np.frombuffer(known, np.uint32).tolist()
        words = caption_ids(self.text_tokenizer, caption)[: self.data.max_caption_tokens]
        if len(self._tokenised) < CAPTION_CACHE:
            self._tokenised[caption] = np.array(words, np.uint32).tobytes()
        return words

    def _noise(self, token_ids: np.ndarray, seed: int | None) -> dict[str, Any]:
        """The ids that the LLM reads instead of ``token_ids`` (L,), and True (L,) for those that it has to predict.

        Departs (D14): the paper does neither. Preceding image tokens predict the next one so well that a short
        training ignores the caption. A random share of them, from 0 to ``token_noise``, is therefore random.
        """
        if seed is None:
            return {}
        rng, length = np.random.default_rng(seed), len(token_ids)
        mask = rng.random(length) < rng.random() * self.data.token_noise
        noise = rng.integers(self.vocabulary.codebook_size, size=length)
        label_mask = rng.random(length) < self.data.label_share
        return {"read_ids": np.where(mask, noise, token_ids), "label_mask": label_mask}

    def _once(self) -> Iterator[Pair]:
        for image in self._images():
            yield Pair(image.captions[0] if image.captions else "", image, None, True, False, None)

    def _endless(self) -> Iterator[Pair]:
        position = itertools.count()
        for number in itertools.count():
            rng = np.random.default_rng([self.seed, number])
            empty = True
            for image in self._shuffled(number, rng):
                empty = False
                count = len(image.captions)
                caption = image.captions[rng.integers(count)] if count else ""
                drop, to_text = rng.random() < self.data.caption_dropout, rng.random() < self.data.image_to_text_share
                step, whole = next(position) // self.step_size, self._length(image)
                lengths = _lengths(self.data, whole)
                share = np.random.default_rng([self.seed, step, 1]).random() if lengths else 0.0
                length = lengths[int(share * len(lengths))] if lengths else None
                ended = self.data.prefix_lengths == "none" or length == whole
                to_text = bool(to_text and caption)
                seed = int(rng.integers(2**63)) if self.data.token_noise or self.data.label_share < 1 else None
                yield Pair("" if drop and not to_text else caption, image, length, ended, to_text, seed)
            if empty:
                sources = ", ".join(self.data.token_sets or self.data.photos)
                raise DataError(f"data: no image to train on in {sources}.")

    def _length(self, image: TokenSample | Sample) -> int:
        """Tokens of an image, before any are cut off."""
        return len(image.token_ids) if isinstance(image, TokenSample) else self.vocabulary.tokens_per_image

    def _images(self, photos: Iterator[Sample] | None = None) -> Iterator[TokenSample | Sample]:
        if self.photos is not None:
            images: Iterator[TokenSample | Sample] = photos or self.photos.epoch()
        else:
            images = itertools.chain.from_iterable(map(token_samples, self.data.token_sets))
        # Whether an image is held out depends on its key alone: the same in every run, without a list.
        limit = self.data.held_out_share * 2**32
        return (image for image in images if (zlib.crc32(image.key.encode()) < limit) == self.held_out)

    def _shuffled(self, number: int, rng: np.random.Generator) -> Iterator[TokenSample | Sample]:
        """Pass ``number``: the stream of photos shuffles itself; tokens are drawn from a window."""
        if self.photos is not None:
            count = len(self.photos)
            yield from self._images(itertools.islice(self.photos.samples(number * count), count))
            return
        window = _Window(self.data.token_sets, self.data.shuffle_window)
        for image in self._images():
            assert isinstance(image, TokenSample)
            if len(window) < self.data.shuffle_window:
                window[len(window)] = image
                continue
            i = int(rng.integers(len(window)))
            drawn, window[i] = window[i], image
            yield drawn
        for i in rng.permutation(len(window)):
            yield window[i]

    def _token_ids(self, batch: Sequence[Pair]) -> list[np.ndarray]:
        """Ids (L,) of every image of ``batch``.  Raises: DataError for a photo that cannot be read."""
        images = [pair.image for pair in batch]
        if self.photos is None:
            return [image.token_ids for image in images if isinstance(image, TokenSample)]
        assert self.image_tokenizer is not None, "photos need an image tokenizer"
        photos = [image for image in images if isinstance(image, Sample)]
        return encode_photos(self.image_tokenizer, photos, self.vocabulary.tokens_per_image)


def _lengths(data: TokenPairs, whole: int) -> Sequence[int]:
    """The numbers of tokens that an image of ``whole`` tokens may keep; empty: it keeps all."""
    if data.prefix_lengths == "none":
        return data.lengths
    return range(1, whole + 1) if data.prefix_lengths == "uniform" else doublings(whole)


@torch.no_grad()
def encode_photos(tokenizer: V2FlowTokenizer, photos: Sequence[Sample], length: int) -> list[np.ndarray]:
    """``length`` ids of each photo at the tokenizer's image size.  Raises: DataError for an unreadable photo."""
    size = tokenizer.config.image_size
    names = [f"{photo.source}/{photo.key}" for photo in photos]
    images = [image_to_tensor(open_image(photo.image, name), size) for photo, name in zip(photos, names)]
    return list(tokenizer.encode(torch.stack(images), length, refine_steps=0).cpu().numpy())


def check_data(data: TokenPairs, tokenizer: V2FlowTokenizer, output: str | None = None) -> tuple[int, int]:
    """(tokens per image, images) of the data; the most tokens if the tokenizer's length is flexible.

    Raises:  TokenFileError for a folder that is no token set or of another tokenizer; DataError if lengths differ, or
             ``data.lengths`` do not fit; and the errors of SampleStream.
    """
    size = tokenizer.config.image_size
    possible = tokenizer.lengths(size, size)
    length = possible[0]
    if data.photos:
        images = len(SampleStream(data.photos, seed=0, output=output))
        if not tokenizer.flexible and len(data.lengths) == 1 and data.lengths[0] in possible:
            length = data.lengths[0]
    else:
        lengths, images = _check_token_sets(data.token_sets, tokenizer.token_digest)
        if not tokenizer.flexible and len(set(lengths.values())) > 1:
            listed = ", ".join(f"{folder}: {length}" for folder, length in lengths.items())
            raise DataError(f"data.token_sets: expected sets of one number of tokens an image, found {listed}.")
        length = max(lengths.values())
    if data.prefix_lengths != "none" and not tokenizer.flexible:
        raise DataError(
            f"data.prefix_lengths is {data.prefix_lengths}, but the image tokenizer has exactly {length} tokens an "
            "image and no prefixes; use none, or a tokenizer of flexible length (recipes/flextok/vocabulary.yaml)."
        )
    fits = max(data.lengths, default=0) <= length if tokenizer.flexible else set(data.lengths) <= {length}
    if not fits:
        fixed = " or ".join(map(str, sorted(possible))) if data.photos else str(length)
        kind = f"takes 1 to {length}" if tokenizer.flexible else f"has exactly {fixed} an image"
        raise DataError(f"data.lengths is {list(data.lengths)}, but the image tokenizer {kind}.")
    return length, images


def log_data(data: TokenPairs, output: str, log: Callable[[str], None]) -> None:
    """Log the files of the data that are left out, and how many images have no caption; by one process."""
    if data.photos:
        stream = SampleStream(data.photos, seed=0, output=output)
        images, without = len(stream), stream.uncaptioned()
        for failure in stream.failures:
            log(f"left out: {failure.name}: {failure.reason}")
        stream.not_taken.log(log)
    else:
        images = without = 0
        for image in itertools.chain.from_iterable(map(token_samples, data.token_sets)):
            images, without = images + 1, without + (not image.captions)
    if without:
        log(f"{without:,} of {images:,} images have no caption: they are trained with the empty prompt")


def _check_token_sets(folders: Sequence[str], digest: str) -> tuple[dict[str, int], int]:
    lengths, images = {}, 0
    steps: dict[int, str] = {}  # of refinement -> the first set that has them
    for folder in folders:
        manifest = token_set_manifest(folder)
        steps.setdefault(manifest.refine_steps, folder)
        manifest.check_tokenizer(digest, folder)
        manifest.check_square(folder)
        lengths[folder] = manifest.tokens_per_image
        images += manifest.count
    if len(steps) > 1:
        (first, one), (second, other), *_ = steps.items()
        raise DataError(
            f"data.token_sets: the ids of {one} are refined in {first} steps, those of {other} in {second}; one image "
            "has different ids in each. Encode all with the same --refine."
        )
    return lengths, images


def count_tokens(data: TokenPairs, codebook_size: int) -> np.ndarray:
    """How often each code occurs in the token sets, (K,) uint32: the unigram model that an LLM has to beat."""
    counts = np.zeros(codebook_size, dtype=np.uint32)
    for folder in data.token_sets:
        for image in token_samples(folder):
            counts += np.bincount(image.token_ids, minlength=codebook_size).astype(np.uint32)
    return counts
