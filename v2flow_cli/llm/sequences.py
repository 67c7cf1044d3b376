"""Training samples and prompts: one builder for both (section 2.4).

to draw     prompt  [prefix] caption [suffix] begin-of-image
            answer  visual tokens, end-of-image, EOS
to caption  prompt  [prefix] begin-of-image, visual tokens, end-of-image [suffix]
            answer  caption, EOS

Prefix and suffix are the LLM's own chat template around the user's text. Only the answer has labels, unless the recipe
sets ``train_on_prompt``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from v2flow_cli.errors import ModelError, foreign_errors
from v2flow_cli.llm.loss import IGNORE, label_positions
from v2flow_cli.llm.vocabulary import VisualVocabulary
from v2flow_cli.store.text import one_line, printable

_MARK = "CAPTION-GOES-HERE"


def prompt_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids before and after the caption: the chat template's single user turn, or nothing without a template.

    They start with one BOS if the template writes it or the tokenizer adds it.
    Raises: ModelError for a template that fails, or changes, drops or doubles the user's text.
    """
    before, after = "", ""
    advice = (
        "Correct the template in a copy of the LLM's folder (chat_template.jinja, or chat_template in "
        "tokenizer_config.json), or delete it: the caption alone is then the prompt."
    )
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": _MARK}]
        with foreign_errors("the LLM's chat template fails on a single user turn", advice):
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        if (count := text.count(_MARK)) != 1:
            raise ModelError(
                f"the LLM's chat template repeats the user's text {count} times; expected once, unchanged. {advice}"
            )
        before, _, after = text.partition(_MARK)
    with foreign_errors("the LLM's text tokenizer cannot tokenize its chat template", advice):
        prefix = tokenizer(before, add_special_tokens=False)["input_ids"] if before else []
        suffix = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
        bos = tokenizer.bos_token_id
        if bos is not None and bos not in prefix and tokenizer("a")["input_ids"][:1] == [bos]:
            prefix = [bos, *prefix]
    return tuple(prefix), tuple(suffix)


def caption_ids(tokenizer: PreTrainedTokenizerBase, caption: str) -> list[int]:
    """Ids of plain text: the name of a special or visual token in a caption is tokenized as text."""
    text = one_line(printable(caption))
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []


def prompt_ids(vocabulary: VisualVocabulary, words: Sequence[int]) -> list[int]:
    """The prompt around the ids of a caption; an empty caption is the unconditional prompt of guidance."""
    return [*vocabulary.prompt_prefix, *words, *vocabulary.prompt_suffix, vocabulary.begin_image_id]


def caption_prompt_ids(vocabulary: VisualVocabulary, token_ids: np.ndarray) -> list[int]:
    """The prompt for a caption of ``token_ids`` (L,)."""
    image = [vocabulary.begin_image_id, *_visual(vocabulary, token_ids), vocabulary.end_image_id]
    return [*vocabulary.prompt_prefix, *image, *vocabulary.prompt_suffix]


def sample(
    vocabulary: VisualVocabulary,
    words: Sequence[int],
    token_ids: np.ndarray,
    *,
    to_text: bool = False,
    train_on_prompt: bool = False,
    ended: bool = True,
    read_ids: np.ndarray | None = None,
    label_mask: np.ndarray | None = None,
) -> dict[str, Any]:
    """input_ids and labels, each (T,), of a caption's ids and an image's (L,): to draw it, or ``to_text``.

    Also ``image_ids`` (L,), the image's ids if it is drawn from a caption, else (0,), and ``image_start``, the position
    of begin-of-image.

    Args:  ended, True if the picture ends after ``token_ids``; read_ids (L,), which the LLM reads in place of the ids
           it has to predict; label_mask (L,), True for the ids that it has to predict. All apply to drawing only.
    """
    stop = [] if vocabulary.eos_id is None else [vocabulary.eos_id]
    if to_text:
        prompt, answer = caption_prompt_ids(vocabulary, token_ids), [*words, *stop]
    else:
        prompt = prompt_ids(vocabulary, words)
        end = [vocabulary.end_image_id, *stop] if ended else []
        answer = [*_visual(vocabulary, token_ids), *end]
    input_ids = np.array(prompt + answer, dtype=np.int64)
    labels = input_ids.copy()
    if not train_on_prompt:
        labels[: len(prompt)] = IGNORE
    image = slice(len(prompt), len(prompt) + len(token_ids))
    if label_mask is not None and not to_text:
        labels[image][~label_mask] = IGNORE
    if read_ids is not None and not to_text:
        input_ids[image] = read_ids.astype(np.int64) + vocabulary.visual_token_offset
    image_ids = token_ids[:0] if to_text or not words else token_ids
    tensors = {"input_ids": input_ids, "labels": labels, "image_ids": image_ids.astype(np.int64)}
    return {name: torch.from_numpy(array) for name, array in tensors.items()} | {"image_start": len(prompt) - 1}


def collate(samples: Sequence[dict[str, Any]], pad_id: int, multiple: int = 1) -> dict[str, Any]:
    """A batch (B, T) padded on the right, where causal attention needs no mask, and its keys.

    T is a multiple of ``multiple``, so that few shapes occur. The rest is computed here, on the CPU, because the host
    would wait for a GPU: ``positions``, the flat ones whose next label has a loss; ``image_starts`` (P,), the flat
    positions of begin-of-image in rows that are drawn from a caption; ``image_ids`` (P, L), their ids, padded with -1.
    """
    pad = torch.nn.utils.rnn.pad_sequence
    longest = max(len(s["input_ids"]) for s in samples)
    width = -(-longest // multiple) * multiple

    def table(name: str, value: int) -> Tensor:
        rows = pad([s[name] for s in samples], batch_first=True, padding_value=value)
        return torch.nn.functional.pad(rows, (0, width - rows.shape[1]), value=value)

    labels = table("labels", IGNORE)
    captioned = [(row, s) for row, s in enumerate(samples) if len(s["image_ids"])]
    starts = [row * width + s["image_start"] for row, s in captioned]
    images = [s["image_ids"] for _, s in captioned]
    return {
        "input_ids": table("input_ids", pad_id),
        "labels": labels,
        "positions": label_positions(labels),
        "image_starts": torch.tensor(starts, dtype=torch.int64),
        "image_ids": pad(images, batch_first=True, padding_value=-1) if images else torch.empty(0, 0).long(),
        "keys": [s["key"] for s in samples if "key" in s],
    }


def _visual(vocabulary: VisualVocabulary, token_ids: np.ndarray) -> list[int]:
    return (token_ids.astype(np.int64) + vocabulary.visual_token_offset).tolist()
