"""The ids of visual tokens among the LLM's own, and the initial values of their rows (section 2.4).

For a codebook of K entries, and V the larger of the rows of the LLM's table (in Qwen more than the text tokenizer has
words: spare rows stay unchanged) and the text tokenizer's highest id + 1 (more than the rows if tokens were added
without rows: these get new rows), the ids of a model that draws are:

    [0, V) text, untouched | [V, V + K) visual tokens | V + K begin of image | V + K + 1 end of image

``visual_token_offset`` is V. ``config.json`` stores all of this under ``v2flow``; transformers alone can load and
sample a saved folder.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from v2flow_cli.errors import ModelError

VISUAL, BEGIN_IMAGE, END_IMAGE, SPARE = "<|v2flow:v_{}|>", "<|v2flow:boi|>", "<|v2flow:eoi|>", "<|v2flow:spare_{}|>"


@dataclass(frozen=True)
class VisualVocabulary:
    """The ids that an LLM draws with, and the prompt of its training."""

    visual_token_offset: int
    codebook_size: int  # K
    begin_image_id: int
    end_image_id: int
    tokens_per_image: int  # L
    tokenizer_digest: str  # of the image tokenizer that these ids belong to
    prompt_prefix: tuple[int, ...]  # ids before the caption, including BOS if the LLM has one
    prompt_suffix: tuple[int, ...]  # ids between the caption and begin_image_id
    eos_id: int | None  # follows end_image_id
    flexible: bool = False  # 1 to tokens_per_image ids an image, instead of exactly that many
    captions: bool = False  # also trained on image to text
    cache: str = "static"  # the kind of key-value cache for drawing, of ``sample.CACHES``

    @classmethod
    def of(cls, config: Any, where: str) -> VisualVocabulary:
        """The vocabulary recorded in a model's config.  Raises: ModelError if there is none, or it is damaged."""
        record = getattr(config, "v2flow", None)
        fields = dataclasses.fields(cls)
        needed = [field.name for field in fields if field.default is dataclasses.MISSING]
        if not isinstance(record, dict) or any(name not in record for name in needed):
            raise ModelError(
                f"{where}: its config.json lists no visual tokens, so this LLM cannot draw. Train it with "
                "`v2flow finetune-llm` first."
            )
        known = {field.name: record[field.name] for field in fields if field.name in record}
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in known.items()}
        return cls(**values)

    def record(self) -> dict[str, Any]:
        """The value of ``config.v2flow``, which ``of`` reads."""
        record = dataclasses.asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in record.items()}

    def check_tokenizer(self, digest: str, name: str, option: str) -> None:
        """Raises: ModelError unless these are the tokens of the image tokenizer with this ``token_digest``.

        Args:  name, of the LLM; option, with which the user names another tokenizer.
        """
        if digest != self.tokenizer_digest:
            raise ModelError(
                f"{name} draws tokens of tokenizer {self.tokenizer_digest}, but this tokenizer is {digest}. "
                f"Use the one that it was trained with: {option}."
            )

    def is_visual(self, ids: Tensor) -> Tensor:
        """True where ``ids`` (any shape) are visual tokens."""
        return (ids >= self.visual_token_offset) & (ids < self.visual_token_offset + self.codebook_size)


def text_ids(tokenizer: PreTrainedTokenizerBase, rows: int) -> int:
    """V, the first id that neither a table of ``rows`` nor ``tokenizer`` uses."""
    return max(rows, 1 + max(tokenizer.get_vocab().values(), default=-1))


def check_extendable(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises: ModelError for a tokenizer that is not fast BPE, has visual tokens, or would read them in text."""
    if not tokenizer.is_fast:
        raise ModelError("the LLM has no fast tokenizer (tokenizer.json); v2flow adds its tokens to that file.")
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model.get("type") != "BPE":
        raise ModelError(
            f"the LLM's tokenizer is of type {model.get('type')}; v2flow extends only BPE. Take an LLM with a "
            "byte-level or SentencePiece BPE tokenizer."
        )
    if any(name in model["vocab"] for name in (BEGIN_IMAGE, END_IMAGE, VISUAL.format(0))):
        raise ModelError(
            "the LLM has visual tokens already; fine-tune its base LLM, or continue its training with "
            "--set new_rows=kept."
        )
    pre_tokenizer, name = tokenizer.backend_tokenizer.pre_tokenizer, VISUAL.format(0)
    whole = pre_tokenizer is None or len(pre_tokenizer.pre_tokenize_str(name)) == 1
    if model.get("ignore_merges") and whole:  # then a word of the vocabulary is read without any merge
        raise ModelError(
            "the LLM's tokenizer would read the name of a visual token in a caption as the token (BPE with "
            "ignore_merges, and text split only at spaces). Take another LLM."
        )


def add_visual_tokens(tokenizer: PreTrainedTokenizerBase, offset: int, codebook_size: int) -> PreTrainedTokenizerBase:
    """A copy of ``tokenizer`` that names ids ``offset`` to ``offset + codebook_size + 1`` but reads none in text.

    The names are in the BPE vocabulary without any merge that leads to them, so no text is ever tokenized as one of
    them, and loading stays fast (16,386 added tokens would take most of a second). Ids below ``offset`` without a name
    get one, because the library warns of gaps.

    Raises:  ModelError as ``check_extendable``.
    """
    check_extendable(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder, "tokenizer.json")
        tree = json.loads(path.read_text(encoding="utf-8"))
        words: dict[str, int] = tree["model"]["vocab"]
        ids = set(words.values())
        added_tokens = {token["id"]: token["content"] for token in tree["added_tokens"]}
        for gap in (i for i in range(offset) if i not in ids):
            words[added_tokens.get(gap, SPARE.format(gap))] = gap
        names = [*(VISUAL.format(i) for i in range(codebook_size)), BEGIN_IMAGE, END_IMAGE]
        words.update((name, offset + i) for i, name in enumerate(names))
        path.write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder)


def table_rows(model: PreTrainedModel) -> tuple[int, int]:
    """(fewest, most) rows of a model's input and output table, which are usually equal."""
    rows = [len(table.weight) for table in (model.get_input_embeddings(), model.get_output_embeddings())]
    return min(rows), max(rows)


def extend_tables(
    model: PreTrainedModel,
    text_size: int,
    codebook_size: int,
    codebook: Tensor | None,
    seed: int,
    offset: int | None = None,
) -> str:
    """Add rows for ``codebook_size`` visual tokens and two marks to the input and output tables.

    They begin at row ``offset``, V; without it, after the larger table. Missing rows before it are for words that were
    added to the tokenizer. A new row is mean + (code - codebook mean) x scale, with the mean of the table's first
    ``text_size`` rows and the scale of their root-mean-square distance from it. A codebook (K, D) of another width than
    the table is first mapped to that width by a seeded semi-orthogonal map, which preserves angles (exactly if the
    table is wider). Without a codebook, and for marks and words, codes are Gaussian. Existing rows stay bit-identical.
    Departs (D12): the paper uses the codes unchanged; shifted and scaled, they neither dominate nor vanish at first.

    Returns: a line for the log.
    """
    sizes = [len(table.weight) for table in (model.get_input_embeddings(), model.get_output_embeddings())]
    fewest, most = min(sizes), max(sizes)
    offset = most if offset is None else offset
    model.resize_token_embeddings(offset + codebook_size + 2, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [(embed.weight, sizes[0])]
    if head.weight is not embed.weight:
        tables.append((head.weight, sizes[1]))
    width = embed.weight.shape[1]
    marks = torch.randn(2, width, generator=generator)
    if codebook is None:
        codes, source = torch.randn(codebook_size, width, generator=generator), "Gaussian rows"
    else:
        codes, source = codebook.detach().float().cpu(), "rows from the tokenizer's codebook"
        if codes.shape[1] != width:
            source += f", mapped from width {codes.shape[1]} to {width} by a random semi-orthogonal matrix"
            codes = codes @ torch.nn.init.orthogonal_(torch.empty(codes.shape[1], width), generator=generator)
    words = torch.randn(offset - fewest, width, generator=generator)
    for weight, first in tables:
        text = weight.detach()[: min(text_size, first)].float().cpu()
        centre = text.mean(0)
        spread = (text - centre).pow(2).sum(1).mean().sqrt()
        rows = torch.cat([_centred(words), _centred(codes), _centred(marks)]) * spread + centre
        with torch.no_grad():
            weight[first:] = rows[first - fewest :].to(weight)
    if len(words):
        source = f"{len(words)} for words of the tokenizer without a row, {source}"
    return f"{len(words) + codebook_size + 2:,} rows added to {len(tables)} table(s) of {fewest:,} x {width}: {source}"


def _centred(codes: Tensor) -> Tensor:
    """``codes`` (K, D) with mean 0 and a root-mean-square row norm of 1."""
    codes = codes - codes.mean(0)
    return codes / codes.pow(2).sum(1).mean().sqrt().clamp_min(1e-12)
