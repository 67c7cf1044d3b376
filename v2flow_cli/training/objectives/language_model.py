"""Trains a small Llama-architecture LM from plain text, for the vocabulary table of a tokenizer.

The ``tokenizers`` library trains its byte-level BPE tokenizer; the text is packed into blocks that Trainer draws in a
seeded order. 1% of the blocks (at most 256) are held out for the loss on the model card.
"""

from __future__ import annotations

import glob
import gzip
import itertools
import math
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from v2flow_cli.errors import DataError, foreign_errors
from v2flow_cli.recipe.load import dump_recipe
from v2flow_cli.recipe.schema import LMModel, LMRecipe
from v2flow_cli.runtime.device import describe_hardware
from v2flow_cli.store.text import decode_text, lines_of, one_line
from v2flow_cli.training.card import front_matter, source_name
from v2flow_cli.training.llm_folder import save_folder
from v2flow_cli.training.llm_trainer import (
    LMTrainer,
    Log,
    RunClock,
    TrainingReport,
    choose_attention,
    estimate,
    optimizer_class,
    run,
    training_arguments,
)
from v2flow_cli.training.memory import building_model
from v2flow_cli.training.output import alone_in_output, check_output

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
# A single turn: the instruction on its own line after one BOS, then the answer and EOS.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
)
HELD_OUT_SHARE, HELD_OUT_MAX = 0.01, 256  # of the blocks


class Blocks(torch.utils.data.Dataset):
    """Rows of one (N, block_size) table of token ids as Trainer samples."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.table[index].astype(np.int64))  # (block_size,)
        return {"input_ids": ids, "labels": ids}


@alone_in_output
def pretrain(recipe: LMRecipe, *, log: Log, resume: bool = False, approximate: bool = False) -> TrainingReport:
    """Train the tokenizer and the LM of ``recipe`` and save them to ``recipe.output``.

    Raises:  DataError for text that is missing, unreadable or too short; ModelError for an output that already
             holds a model (without ``resume``) and for a loss that is not finite.
    """
    check_output(recipe.output, resume)
    paths = find_text(recipe.text)
    tokenizer = train_tokenizer(read_documents(paths), recipe.model.vocab_size)
    table = pack(read_documents(paths), tokenizer, recipe.block_size)
    held_out = min(HELD_OUT_MAX, math.ceil(HELD_OUT_SHARE * len(table)))
    if len(table) - held_out < recipe.train.batch_size:
        raise DataError(
            f"text: {table.size} tokens in {len(paths)} file(s), fewer than one batch of {recipe.train.batch_size} "
            f"blocks of {recipe.block_size} beside the held-out ones. Use more text, or a smaller train.batch_size."
        )
    order = np.random.default_rng(recipe.train.seed).permutation(len(table))
    with building_model():
        model = build_model(recipe.model, tokenizer, recipe.train.seed)
    log(
        f"{len(paths)} text file(s), {table.size:,} tokens, {len(table):,} blocks of {recipe.block_size} "
        f"({held_out} held out); LM of {model.num_parameters():,} parameters over {len(tokenizer):,} words"
    )
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    clock = RunClock(recipe.train, dump_recipe(recipe), log)
    arguments = training_arguments(recipe.optimizer, recipe.train, recipe.output)
    choose_attention(model, recipe.block_size, arguments.device)
    trainer = LMTrainer(
        model=model,
        args=arguments,
        train_dataset=Blocks(table[order[held_out:]]),
        eval_dataset=Blocks(table[order[:held_out]]),
        optimizer_cls_and_kwargs=optimizer_class(recipe.optimizer),
    )
    run(trainer, clock, recipe.output, resume, log, approximate)
    report = trainer.report(recipe.output, model.num_parameters(), held_out=True)
    files = {"README.md": _card(recipe, report, table.size), "recipe.yaml": dump_recipe(recipe)}
    save_folder(trainer, trainer.model, tokenizer, recipe.output, recipe.train.save_dtype, files)
    return report


def plan(recipe: LMRecipe, resume: bool = False) -> dict[str, int | float]:
    """Sizes and rough estimates of a run, without running it.

    Raises:  DataError for text that is missing; ModelError for an output that may not be written.
    """
    check_output(recipe.output, resume)
    files = find_text(recipe.text)
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(recipe.model, recipe.model.vocab_size))
    size, vocab_size = model.num_parameters(), recipe.model.vocab_size
    return {"text_files": len(files)} | estimate(recipe.train, size, size, recipe.block_size, vocab_size, model.config)


def find_text(patterns: Iterable[str]) -> list[Path]:
    """The files that ``patterns`` name, sorted within each. Raises: DataError for a pattern without a file."""
    paths: list[Path] = []
    for pattern in patterns:
        matches = glob.glob(os.path.expanduser(pattern), recursive=True)
        files = sorted(Path(path) for path in matches if os.path.isfile(path))
        if not files:
            raise DataError(f"text: {pattern} matches no file. Name .txt or .gz files: --set 'text=[PATH, ...]'.")
        paths.extend(files)
    return paths


def read_documents(paths: Iterable[Path]) -> Iterator[str]:
    """Documents of text files: paragraphs (line breaks folded) in a file that has blank lines, else lines."""
    for path in paths:
        with foreign_errors(f"{path}: not readable as UTF-8 text", "Use .txt or .gz files.", DataError):
            with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
                text = decode_text(file.read(), path).strip()
        lines = lines_of(text)
        paragraphs = "\n".join(lines).split("\n\n")
        for document in paragraphs if len(paragraphs) > 1 else lines:
            if document := one_line(document):
                yield document


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``vocab_size`` words (fewer if the text holds no more), with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def pack(documents: Iterable[str], tokenizer: PreTrainedTokenizerFast, block_size: int) -> np.ndarray:
    """The documents, each between BOS and EOS, cut into blocks (N, block_size); an incomplete last one is dropped."""
    ids = array("H" if len(tokenizer) <= 65_536 else "I")
    documents = iter(documents)
    while batch := list(itertools.islice(documents, 1024)):
        for row in tokenizer(batch, add_special_tokens=False, split_special_tokens=True)["input_ids"]:
            ids.extend((tokenizer.bos_token_id, *row, tokenizer.eos_token_id))
    count = len(ids) // block_size
    return np.array(ids, dtype=ids.typecode)[: count * block_size].reshape(count, block_size)


def build_model(spec: LMModel, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A randomly initialised Llama of the recipe's shape, the same for the same seed."""
    config = llama_config(spec, len(tokenizer))
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def llama_config(spec: LMModel, vocab_size: int) -> LlamaConfig:
    """The recipe's shape as a transformers config."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        max_position_embeddings=spec.max_positions,
        tie_word_embeddings=spec.tie_embeddings,
    )


def _card(recipe: LMRecipe, report: TrainingReport, tokens: int) -> str:
    speed = report.sequences_per_second * recipe.block_size
    seen = report.steps * recipe.train.batch_size * recipe.block_size
    hardware = f"{report.processes} process(es) on {describe_hardware()}"
    head = front_matter(
        recipe.card,
        recipe.output,
        library="transformers",
        task="text-generation",
        base_models=(),
        data=recipe.text,
        metrics={"loss": report.eval_loss} if report.eval_loss is not None else {},
        split="validation",
    )
    return f"""{head}
# A small language model for v2flow

A Llama-architecture LM of {report.parameters:,} parameters over {recipe.model.vocab_size:,} byte-level BPE words.
It is the text part of a v2flow model: the image tokenizer's soft vocabulary mixes the rows of its table, and
`v2flow finetune-llm` trains it to draw. It is too small for use as a chatbot.

| | |
|---|---|
| text | {", ".join(map(source_name, recipe.text))} ({tokens:,} tokens) |
| seen | {report.steps:,} steps of {recipe.train.batch_size} x {recipe.block_size} tokens ({seen:,} tokens) |
| hardware, wall time | {hardware}, {report.minutes:.1f} minutes, {speed:,.0f} tokens/s |
| training loss at the end | {report.train_loss:.3f} nats a token |
| loss on held-out blocks | {report.eval_loss:.3f} nats a token |
| made by | `v2flow finetune-llm` with `recipe.yaml` in this folder |
"""
