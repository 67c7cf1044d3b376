"""Training samples and prompts: one builder for both (section 2.4).

to draw     prompt  [prefix] caption [suffix] begin-of-image
            answer  visual tokens, end-of-image, EOS
to caption  prompt  [prefix] begin-of-image, visual tokens, end-of-image [suffix]
            answer  caption, EOS

Prefix and suffix are the LLM's own chat template around what the user says. The answer has the only labels, unless
the recipe says otherwise.
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

_MARK = "CAPTION-STANDS-HERE"


def prompt_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids before and after the caption: the chat template's single user turn, or nothing where there is none.

    BOS stands in front exactly once if the template writes it or the tokenizer adds it by itself.
    Raises: ModelError for a template that fails, or changes, drops or doubles the user's words.
    """
    before, after = "", ""
    advice = (
        "Mend the template in a copy of the LLM's folder (chat_template.jinja, or chat_template in "
        "tokenizer_config.json), or delete it: the caption alone is then the prompt."
    )
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": _MARK}]
        with foreign_errors("the LLM's chat template fails on a single turn of the user", advice):
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        if (count := text.count(_MARK)) != 1:
            raise ModelError(
                f"the LLM's chat template repeats the user's words {count} times; expected once, unchanged. {advice}"
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
    """Ids of plain text: a special or visual token's name that a caption spells stays text."""
    text = one_line(printable(caption))
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []


def prompt_ids(vocabulary: VisualVocabulary, words: Sequence[int]) -> list[int]:
    """The prompt around the ids of a caption; an empty caption is the unconditional prompt of guidance."""
    return [*vocabulary.prompt_prefix, *words, *vocabulary.prompt_suffix, vocabulary.begin_image_id]


def caption_prompt_ids(vocabulary: VisualVocabulary, token_ids: np.ndarray) -> list[int]:
    """The prompt that asks for the caption of ``token_ids`` (L,)."""
    image = [vocabulary.begin_image_id, *_visual(vocabulary, token_ids), vocabulary.end_image_id]
    return [*vocabulary.prompt_prefix, *image, *vocabulary.prompt_suffix]


def answer_ids(vocabulary: VisualVocabulary, token_ids: np.ndarray, ended: bool = True) -> list[int]:
    """The answer that draws ``token_ids`` (L,): visual tokens, and where the picture has ``ended`` its mark and EOS."""
    visual = _visual(vocabulary, token_ids)
    return [*visual, vocabulary.end_image_id, *_stop(vocabulary)] if ended else visual


def sample(
    vocabulary: VisualVocabulary,
    words: Sequence[int],
    token_ids: np.ndarray,
    *,
    to_text: bool = False,
    train_on_prompt: bool = False,
    ended: bool = True,
    read_ids: np.ndarray | None = None,
    learned: np.ndarray | None = None,
) -> dict[str, Any]:
    """input_ids and labels, each (T,), of a caption's ids and an image's (L,): to draw it, or ``to_text``.

    And ``picture`` (L,), the image's ids where a caption asks for it, else (0,); ``asked_at``, where it begins.

    Args:  ended, whether the picture ends after these ids. To draw it, the LLM may be given other ``read_ids`` (L,)
           than those it has to predict, and may have to predict only those where ``learned`` (L,) is True.
    """
    if to_text:
        prompt, answer = caption_prompt_ids(vocabulary, token_ids), [*words, *_stop(vocabulary)]
    else:
        prompt, answer = prompt_ids(vocabulary, words), answer_ids(vocabulary, token_ids, ended)
    input_ids = np.array(prompt + answer, dtype=np.int64)
    labels = input_ids.copy()
    if not train_on_prompt:
        labels[: len(prompt)] = IGNORE
    picture = slice(len(prompt), len(prompt) + len(token_ids))
    if learned is not None and not to_text:
        labels[picture][~learned] = IGNORE
    if read_ids is not None and not to_text:
        input_ids[picture] = read_ids.astype(np.int64) + vocabulary.visual_token_offset
    foretold = token_ids[:0] if to_text or not words else token_ids
    tensors = {"input_ids": input_ids, "labels": labels, "picture": foretold.astype(np.int64)}
    return {name: torch.from_numpy(array) for name, array in tensors.items()} | {"asked_at": len(prompt) - 1}


def collate(samples: Sequence[dict[str, Any]], pad_id: int, multiple: int = 1) -> dict[str, Any]:
    """A batch (B, T) padded on the right, which causal attention never looks at: no mask is needed; and keys.

    T is a ``multiple`` of so many positions, so that few shapes occur. What would take the host a look at the batch on
    a GPU is found here: ``positions``, the flat ones whose next label is learned; ``asked``, the rows (P,) with a
    picture that a caption asks for; ``asked_at``, the flat positions where these begin; ``pictures`` (P, L), their ids,
    which end with -1.
    """
    pad = torch.nn.utils.rnn.pad_sequence
    longest = max(len(s["input_ids"]) for s in samples)
    width = -(-longest // multiple) * multiple

    def table(name: str, value: int) -> Tensor:
        rows = pad([s[name] for s in samples], batch_first=True, padding_value=value)
        return torch.nn.functional.pad(rows, (0, width - rows.shape[1]), value=value)

    labels = table("labels", IGNORE)
    asking = [row for row, s in enumerate(samples) if len(s["picture"])]
    pictures = [samples[row]["picture"] for row in asking]
    return {
        "input_ids": table("input_ids", pad_id),
        "labels": labels,
        "positions": label_positions(labels),
        "asked": torch.tensor(asking, dtype=torch.int64),
        "asked_at": torch.tensor([row * width + samples[row]["asked_at"] for row in asking], dtype=torch.int64),
        "pictures": pad(pictures, batch_first=True, padding_value=-1) if pictures else torch.empty(0, 0).long(),
        "keys": [s["key"] for s in samples if "key" in s],
    }


def _visual(vocabulary: VisualVocabulary, token_ids: np.ndarray) -> list[int]:
    return (token_ids.astype(np.int64) + vocabulary.visual_token_offset).tolist()


def _stop(vocabulary: VisualVocabulary) -> list[int]:
    return [] if vocabulary.eos_id is None else [vocabulary.eos_id]
