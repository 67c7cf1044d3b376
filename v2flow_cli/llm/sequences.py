"""Training samples and prompts: one builder for both (section 2.4).

prompt  [prefix] caption [suffix] begin-of-image        the LLM's own chat template around the caption
answer  visual tokens, end-of-image, EOS                the only labels, unless the recipe says otherwise
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from v2flow_cli.errors import DataError, ModelError, TokenFileError
from v2flow_cli.llm.vocabulary import VisualVocabulary
from v2flow_cli.recipe.schema import TokenPairs
from v2flow_cli.store.token_file import TokenManifest, TokenSample, read_token_set

IGNORE = -100  # label of positions that are not learned
_MARK = "CAPTION-STANDS-HERE"


def prompt_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids before and after the caption: the chat template's single user turn, or nothing where there is none.

    BOS stands in front exactly once if the template writes it or the tokenizer adds it by itself.
    Raises: ModelError for a template that changes or drops the user's words.
    """
    before, after = "", ""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": _MARK}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        before, mark, after = text.partition(_MARK)
        if not mark:
            raise ModelError("the LLM's chat template does not repeat the user's words; v2flow cannot prompt it.")
    prefix = tokenizer(before, add_special_tokens=False)["input_ids"] if before else []
    suffix = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    bos = tokenizer.bos_token_id
    if bos is not None and bos not in prefix and tokenizer("a")["input_ids"][0] == bos:
        prefix = [bos, *prefix]
    return tuple(prefix), tuple(suffix)


def caption_ids(tokenizer: PreTrainedTokenizerBase, caption: str) -> list[int]:
    """Ids of plain text: a special or visual token's name that a caption spells stays text."""
    text = " ".join(caption.split())
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []


def prompt_ids(vocabulary: VisualVocabulary, caption: Sequence[int]) -> list[int]:
    """The prompt around the ids of a caption; an empty caption is the unconditional prompt of guidance."""
    return [*vocabulary.prompt_prefix, *caption, *vocabulary.prompt_suffix, vocabulary.begin_image_id]


class Samples(torch.utils.data.IterableDataset):
    """Samples of token sets, read as a stream: input_ids and labels, each (T,) int64.

    Without ``held_out`` it never ends: every pass draws one of an image's captions, drops it with the recipe's
    probability, and mixes the order in a window, all from ``seed`` and the number of the pass. The n-th sample is
    always the same, so a resumed run goes on exactly by skipping. With ``held_out`` it is one pass in file order over
    the held-out images, each with its first caption.
    """

    def __init__(
        self,
        data: TokenPairs,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: VisualVocabulary,
        seed: int,
        held_out: bool = False,
    ) -> None:
        self.data, self.tokenizer, self.vocabulary = data, tokenizer, vocabulary
        self.seed, self.held_out = seed, held_out

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.held_out:
            for pair in self._pairs():
                yield self.sample(pair.captions[0] if pair.captions else "", pair.token_ids)
            return
        for number in itertools.count():
            rng = np.random.default_rng([self.seed, number])
            empty = True
            for pair in self._shuffled(rng):
                empty = False
                choice, dropped = rng.integers(max(1, len(pair.captions))), rng.random() < self.data.caption_dropout
                yield self.sample("" if dropped or not pair.captions else pair.captions[choice], pair.token_ids)
            if empty:
                raise DataError(f"data.token_sets: no image to train on in {', '.join(self.data.token_sets)}.")

    def sample(self, caption: str, token_ids: np.ndarray) -> dict[str, Tensor]:
        """The training sample of one caption and one image's ids (L,)."""
        words = caption_ids(self.tokenizer, caption)[: self.data.max_caption_tokens]
        prompt = prompt_ids(self.vocabulary, words)
        answer = answer_ids(self.vocabulary, token_ids)
        labels = [*(prompt if self.data.train_on_prompt else [IGNORE] * len(prompt)), *answer]
        return {"input_ids": torch.tensor(prompt + answer), "labels": torch.tensor(labels)}

    def _pairs(self) -> Iterator[TokenSample]:
        for folder in self.data.token_sets:
            for pair in read_token_set(Path(folder)):
                # Which images are held out depends on their key alone: no list to keep, the same in every run.
                if (zlib.crc32(pair.key.encode()) < self.data.held_out_share * 2**32) == self.held_out:
                    yield pair._replace(token_ids=pair.token_ids.astype(np.uint32))

    def _shuffled(self, rng: np.random.Generator) -> Iterator[TokenSample]:
        window: list[TokenSample] = []
        for pair in self._pairs():
            if len(window) < self.data.shuffle_window:
                window.append(pair)
                continue
            drawn = int(rng.integers(len(window)))
            window[drawn], pair = pair, window[drawn]
            yield pair
        for drawn in rng.permutation(len(window)):
            yield window[drawn]


def answer_ids(vocabulary: VisualVocabulary, token_ids: np.ndarray) -> list[int]:
    """The answer that draws ``token_ids`` (L,): visual tokens, the end mark, EOS."""
    visual = (token_ids.astype(np.int64) + vocabulary.visual_token_offset).tolist()
    return [*visual, vocabulary.end_image_id, *([] if vocabulary.eos_id is None else [vocabulary.eos_id])]


def collate(samples: Sequence[dict[str, Tensor]], pad_id: int) -> dict[str, Tensor]:
    """A batch (B, T) padded on the right, which causal attention never looks at: no mask is needed."""
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([s["input_ids"] for s in samples], batch_first=True, padding_value=pad_id),
        "labels": pad([s["labels"] for s in samples], batch_first=True, padding_value=IGNORE),
    }


def check_token_sets(folders: Sequence[str], digest: str) -> tuple[int, int]:
    """(tokens an image, images) of token sets that belong together and to the tokenizer with ``digest``.

    Raises:  TokenFileError for a folder that is no token set or of another tokenizer; DataError where lengths differ.
    """
    lengths, images = {}, 0
    for folder in folders:
        manifest = TokenManifest.load(Path(folder))
        if manifest is None:
            raise TokenFileError(f"{folder}: no token manifest in it; expected the output of `v2flow encode`.")
        manifest.check_tokenizer(digest, folder)
        lengths[folder] = manifest.tokens_per_image
        images += manifest.count
    if len(set(lengths.values())) != 1:
        said = ", ".join(f"{folder}: {length}" for folder, length in lengths.items()) or "none given"
        raise DataError(f"data.token_sets: expected sets of one number of tokens an image, found {said}.")
    return next(iter(lengths.values())), images
