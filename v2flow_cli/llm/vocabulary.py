"""Where visual tokens sit among the LLM's own, and what their rows start from (section 2.4).

The ids of a model that draws, for a table of V rows (V may exceed the text tokenizer's words, as in Qwen: spare
rows stay what they are) and a codebook of K entries:

    [0, V) text, untouched | [V, V + K) visual tokens | V + K begin of image | V + K + 1 end of image

``visual_token_offset`` is V. All of it stands in ``config.json`` under ``v2flow``, so that a saved folder needs
nothing of ours to be loaded or sampled.
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
    """The ids that an LLM draws with, and the prompt it was taught with."""

    visual_token_offset: int
    codebook_size: int  # K
    begin_image_id: int
    end_image_id: int
    tokens_per_image: int  # L
    tokenizer_digest: str  # of the image tokenizer whose ids these are
    prompt_prefix: tuple[int, ...]  # ids before the caption, BOS included where the LLM has one
    prompt_suffix: tuple[int, ...]  # ids between the caption and begin_image_id
    eos_id: int | None  # follows end_image_id
    flexible: bool = False  # 1 to tokens_per_image ids an image, instead of exactly that many
    captions: bool = False  # also taught image to text

    @classmethod
    def of(cls, config: Any, where: str) -> VisualVocabulary:
        """The vocabulary recorded in a model's config.  Raises: ModelError if there is none, or it is damaged."""
        record = getattr(config, "v2flow", None)
        fields = dataclasses.fields(cls)
        needed = [field.name for field in fields if field.default is dataclasses.MISSING]
        if not isinstance(record, dict) or any(name not in record for name in needed):
            raise ModelError(
                f"{where}: no visual tokens recorded in its config.json, so this LLM cannot draw. "
                "Teach it with `v2flow finetune-llm` first."
            )
        known = {field.name: record[field.name] for field in fields if field.name in record}
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in known.items()}
        return cls(**values)

    def record(self) -> dict[str, Any]:
        """What ``of`` reads back from ``config.v2flow``."""
        record = dataclasses.asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in record.items()}

    def check_tokenizer(self, digest: str, name: str, option: str) -> None:
        """Raises: ModelError unless these are the tokens of the image tokenizer with this ``token_digest``.

        Args:  name, of the LLM; option, by which the user gives another tokenizer.
        """
        if digest != self.tokenizer_digest:
            raise ModelError(
                f"{name} draws tokens of tokenizer {self.tokenizer_digest}, but the tokenizer at hand is {digest}. "
                f"Give the one it was taught with: {option}."
            )

    def is_visual(self, ids: Tensor) -> Tensor:
        """True where ``ids`` (any shape) are visual tokens."""
        return (ids >= self.visual_token_offset) & (ids < self.visual_token_offset + self.codebook_size)


def add_visual_tokens(tokenizer: PreTrainedTokenizerBase, offset: int, codebook_size: int) -> PreTrainedTokenizerBase:
    """A copy of ``tokenizer`` that can name ids ``offset`` to ``offset + codebook_size + 1``, but never reads them.

    The names enter the BPE vocabulary without any merge that leads to them, so no text, however it is spelt, is
    ever tokenized as one of them, and loading stays fast (16,386 added tokens cost most of a second). Ids below
    ``offset`` that have no name yet get one, since the library warns of holes.

    Raises:  ModelError for a tokenizer that is not a fast BPE one, or that knows such names already.
    """
    if not tokenizer.is_fast:
        raise ModelError("the LLM has no fast tokenizer (tokenizer.json); v2flow adds its tokens to that file.")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder, "tokenizer.json")
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["model"].get("type") != "BPE":
            raise ModelError(f"the LLM's tokenizer is of type {tree['model'].get('type')}; v2flow extends BPE ones.")
        words: dict[str, int] = tree["model"]["vocab"]
        if any(name in words for name in (BEGIN_IMAGE, END_IMAGE, VISUAL.format(0))):
            raise ModelError(
                "the LLM has visual tokens already; fine-tune the LLM that it was made from, or go on with "
                "--set new_rows=kept."
            )
        named = set(words.values())
        added = {token["id"]: token["content"] for token in tree["added_tokens"]}
        for unnamed in (i for i in range(offset) if i not in named):
            words[added.get(unnamed, SPARE.format(unnamed))] = unnamed
        names = [*(VISUAL.format(i) for i in range(codebook_size)), BEGIN_IMAGE, END_IMAGE]
        words.update((name, offset + i) for i, name in enumerate(names))
        path.write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder)


def extend_tables(
    model: PreTrainedModel, text_size: int, codebook_size: int, codebook: Tensor | None, seed: int
) -> str:
    """Add rows for ``codebook_size`` visual tokens and two marks to the input and output tables; a line for the log.

    New rows of a table become mean + (code - codebook mean) x scale, with the mean of the table's first ``text_size``
    rows and the scale that gives their root-mean-square distance from it. A codebook (K, D) of another width than
    the table is first turned into it by a seeded semi-orthogonal map, which keeps angles (exactly where the table is
    wider). Without a codebook, and for the two marks, codes are Gaussian. Existing rows stay bit-identical.
    Departs (D12): the paper takes the codes as they are; moved and scaled they neither dominate nor vanish at first.
    """
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(before + codebook_size + 2, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    tables = {id(table.weight): table.weight for table in (model.get_input_embeddings(), model.get_output_embeddings())}
    width = next(iter(tables.values())).shape[1]
    marks = torch.randn(2, width, generator=generator)
    if codebook is None:
        codes, said = torch.randn(codebook_size, width, generator=generator), "Gaussian rows"
    else:
        codes, said = codebook.detach().float().cpu(), "rows from the tokenizer's codebook"
        if codes.shape[1] != width:
            said += f", turned from width {codes.shape[1]} to {width} by a random semi-orthogonal map"
            codes = codes @ torch.nn.init.orthogonal_(torch.empty(codes.shape[1], width), generator=generator)
    for weight in tables.values():
        text = weight.detach()[:text_size].float().cpu()
        centre = text.mean(0)
        spread = (text - centre).pow(2).sum(1).mean().sqrt()
        rows = torch.cat([_centred(codes), _centred(marks)]) * spread + centre
        with torch.no_grad():
            weight[before:] = rows.to(weight)
    return f"{codebook_size + 2:,} rows added to {len(tables)} table(s) of {before:,} x {width}: {said}"


def _centred(codes: Tensor) -> Tensor:
    """``codes`` (K, D) with mean 0 and a root-mean-square row norm of 1."""
    codes = codes - codes.mean(0)
    return codes / codes.pow(2).sum(1).mean().sqrt().clamp_min(1e-12)
