"""A colour for each code, and the word of the LLM's vocabulary that is nearest to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from v2flow_cli.bench.report.illustrations import token_colours
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.embedded import EMBEDDED_MODEL

CODES_AT_A_TIME = 1024  # keeps the cosines of a vocabulary of 152,000 words at 600 MB


@dataclass(frozen=True)
class TokenView:
    """colours (K, 3) uint8 by code; word_colours and words by nearest word, if there is a vocabulary.

    ordered: the tokens lie in an order of importance, and not on a grid.
    """

    colours: np.ndarray
    word_colours: np.ndarray | None = None
    words: tuple[str, ...] = ()
    ordered: bool = False


def token_view(tokenizer: V2FlowTokenizer) -> TokenView:
    """Near codes and near words get similar colours; a tokenizer without vocabulary has no words."""
    colours = token_colours(tokenizer.codebook)
    if tokenizer.vocabulary is None:
        return TokenView(colours, ordered=tokenizer.flexible)
    nearest = nearest_words(tokenizer.quantizer.vectors, tokenizer.vocabulary.table)
    names = _word_names(tokenizer, len(tokenizer.vocabulary.table))
    return TokenView(
        colours,
        token_colours(tokenizer.vocabulary.table)[nearest],
        tuple(names[i] if names else f"#{i}" for i in nearest),
        ordered=tokenizer.flexible,
    )


def nearest_words(codes: Tensor, table: Tensor) -> np.ndarray:
    """Index (K,) of the row of ``table`` (V, D) with the largest cosine to each of ``codes`` (K, D)."""
    rows = normalize(table.detach().float(), dim=-1)
    parts = [(normalize(part, dim=-1) @ rows.T).argmax(-1) for part in codes.detach().float().split(CODES_AT_A_TIME)]
    return torch.cat(parts).cpu().numpy()


def _word_names(tokenizer: V2FlowTokenizer, count: int) -> list[str]:
    """The LLM's words as text, from the tokenizer.json of the LLM in the config; empty if it is not available."""
    from tokenizers import Tokenizer

    folder = Path((tokenizer.config.vocabulary or {}).get("llm", ""))
    if Path(tokenizer.config.name_or_path) == EMBEDDED_MODEL:
        folder = EMBEDDED_MODEL.parent / "llm"  # its text tokens are those of the vocabulary
    file = folder / "tokenizer.json"
    if not file.is_file():
        return []
    words = Tokenizer.from_file(str(file))
    if words.get_vocab_size(with_added_tokens=True) < count:
        return []
    return [words.decode([i], skip_special_tokens=False) for i in range(count)]
