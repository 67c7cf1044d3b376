"""Teach a causal LM the visual tokens (section 2.4): load, extend the vocabulary, train, save a plain folder.

The loop is transformers' Trainer, under plain Python, ``accelerate launch`` or torchrun alike. What is ours: the
loss on the answer alone, with text and visual parts logged apart, and what is trained:

    full    every weight (the paper)
    lora    adapters on every linear layer and the new rows (peft), merged into the folder that is saved
    rows    the new rows alone
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from v2flow_cli.errors import ModelError
from v2flow_cli.llm.sequences import IGNORE, Samples, check_token_sets, collate, prompt_frame
from v2flow_cli.llm.trainer import (
    LMTrainer,
    Log,
    RunClock,
    TrainingReport,
    check_output,
    estimate,
    run,
    save_folder,
    training_arguments,
)
from v2flow_cli.llm.vocabulary import VisualVocabulary, add_visual_tokens, extend_tables
from v2flow_cli.recipe.load import dump_recipe
from v2flow_cli.recipe.schema import FinetuneRecipe, Lora
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.hardware import describe_hardware

HELD_OUT_MAX = 512  # images that the held-out loss is taken on


class DrawingTrainer(LMTrainer):
    """Cross-entropy of the labelled positions, and z-loss; text and visual losses are logged apart."""

    def __init__(self, *args: Any, vocabulary: VisualVocabulary, z_loss: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.vocabulary, self.z_loss = vocabulary, z_loss
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the micro-batch; Trainer averages those
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self.keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
        self.sums = {"text": [0.0, 0], "visual": [0.0, 0]}

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        input_ids, labels = inputs["input_ids"], inputs["labels"]
        targets = labels[:, 1:]  # position t predicts the token at t + 1
        learned = targets != IGNORE
        # The output table is half the work of a small LM: no logits before the first label.
        first = int(learned.any(0).nonzero()[0])
        keep = {"logits_to_keep": labels.shape[1] - first} if self.keeps_logits else {}
        outputs = model(input_ids=input_ids, **keep)
        logits = outputs.logits[:, -(labels.shape[1] - first) : -1][learned[:, first:]].float()  # (M, V)
        targets = targets[learned]  # (M,)
        losses = F.cross_entropy(logits, targets, reduction="none")
        if model.training:
            self._count(losses.detach(), self.vocabulary.is_visual(targets))
        loss = losses.mean()
        if self.z_loss:
            loss = loss + self.z_loss * logits.logsumexp(-1).square().mean()
        return (loss, outputs) if return_outputs else loss

    def _count(self, losses: Tensor, visual: Tensor) -> None:
        for name, chosen in (("text", ~visual), ("visual", visual)):
            self.sums[name][0] += float(losses[chosen].sum())
            self.sums[name][1] += int(chosen.sum())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            for name, (total, count) in self.sums.items():
                if count:
                    logs[f"{name}_loss"] = total / count
                self.sums[name] = [0.0, 0]
        super().log(logs, *args, **kwargs)


def finetune(recipe: FinetuneRecipe, *, log: Log, resume: bool = False) -> TrainingReport:
    """Fine-tune ``recipe.llm`` on the recipe's token sets and save a model that draws to ``recipe.output``.

    Raises:  ModelError for an LLM or tokenizer that cannot be loaded or extended, an output that already holds a model
             (without ``resume``), sequences longer than the LLM's context, and a loss that is not finite;
             TokenFileError and DataError for token sets that are missing, damaged or of another tokenizer.
    """
    check_output(recipe.output, resume)
    image_tokenizer = V2FlowTokenizer.from_pretrained(recipe.tokenizer)
    length, images = check_token_sets(recipe.data.token_sets, image_tokenizer.digest)
    arguments = training_arguments(recipe.optimizer, recipe.train, recipe.output)
    # Adapters leave the LLM's weights alone, so those may stay in bf16; what is trained is kept in float32.
    dtype = torch.bfloat16 if recipe.mode == "lora" and arguments.bf16 else torch.float32
    model, text_tokenizer = load_llm(recipe.llm, dtype)
    codebook = image_tokenizer.codebook if recipe.new_rows == "codebook" else None
    codebook_size = image_tokenizer.config.codebook_size
    offset = model.get_input_embeddings().weight.shape[0]
    log(extend_tables(model, len(text_tokenizer), codebook_size, codebook, recipe.train.seed))
    prefix, suffix = prompt_frame(text_tokenizer)
    vocabulary = VisualVocabulary(
        visual_token_offset=offset,
        codebook_size=codebook_size,
        begin_image_id=offset + codebook_size,
        end_image_id=offset + codebook_size + 1,
        tokens_per_image=length,
        tokenizer_digest=image_tokenizer.digest,
        prompt_prefix=prefix,
        prompt_suffix=suffix,
        eos_id=text_tokenizer.eos_token_id,
    )
    model.config.v2flow = vocabulary.record()
    check_context(model.config, vocabulary, recipe.data.max_caption_tokens)
    text_tokenizer = add_visual_tokens(text_tokenizer, offset, codebook_size)
    set_seed(recipe.train.seed)  # adapters start from random numbers
    model = choose_trained(model, recipe.mode, recipe.lora, offset)
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log(f"{images:,} images of {length} tokens; {model.num_parameters():,} parameters, {trained:,} of them trained")

    samples = functools.partial(Samples, recipe.data, text_tokenizer, vocabulary, recipe.train.seed)
    held_out = list(itertools.islice(samples(held_out=True), HELD_OUT_MAX))
    pad_id = text_tokenizer.pad_token_id or text_tokenizer.eos_token_id or 0
    clock = RunClock(recipe.train.max_minutes, recipe.train.batch_size, log)
    trainer = DrawingTrainer(
        model=model,
        args=arguments,
        train_dataset=samples(),
        eval_dataset=held_out,
        data_collator=functools.partial(collate, pad_id=pad_id),
        vocabulary=vocabulary,
        z_loss=recipe.z_loss,
    )
    run(trainer, clock, recipe.output, resume, log)
    report = TrainingReport(
        output=recipe.output,
        parameters=model.num_parameters(),
        steps=trainer.state.global_step,
        minutes=clock.seconds / 60,
        sequences_per_second=clock.sequences_per_second(trainer.state.global_step),
        train_loss=clock.last_loss,
        eval_loss=trainer.evaluate()["eval_loss"] if held_out else None,
    )
    plain = trainer.model.merge_and_unload() if recipe.mode == "lora" else trainer.model
    files = {"README.md": _card(recipe, report, images, len(held_out), vocabulary), "recipe.yaml": dump_recipe(recipe)}
    save_folder(trainer, plain, text_tokenizer, recipe.output, recipe.train.save_dtype, files)
    return report


def plan(recipe: FinetuneRecipe) -> dict[str, int | float]:
    """Sizes and rough estimates of a run, from configs alone.  Raises: as ``finetune`` for inputs that do not fit."""
    image_tokenizer = V2FlowTokenizer.from_pretrained(recipe.tokenizer)
    length, images = check_token_sets(recipe.data.token_sets, image_tokenizer.digest)
    with _loading(recipe.llm):
        config, text_tokenizer = AutoConfig.from_pretrained(recipe.llm), AutoTokenizer.from_pretrained(recipe.llm)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    offset = model.get_input_embeddings().weight.shape[0]
    vocab_size = offset + image_tokenizer.config.codebook_size + 2
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    parameters = model.num_parameters()
    model = choose_trained(model, recipe.mode, recipe.lora, offset)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if recipe.mode == "rows":
        trained -= offset * model.config.hidden_size * (1 if model.config.tie_word_embeddings else 2)
    sequence = sum(map(len, prompt_frame(text_tokenizer))) + 3 + recipe.data.max_caption_tokens + length
    return {"images": images, "tokens_per_image": length} | estimate(
        recipe.train, parameters, trained, sequence, vocab_size, config
    )


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"llm {name}: cannot be loaded as a causal LM ({reason}). Give a Hugging Face model folder or hub id; "
            "recipes/default/lm.yaml makes one."
        ) from error


def load_llm(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM and its text tokenizer from a folder or hub id.  Raises: ModelError."""
    disable_progress_bar()
    with _loading(name):
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), AutoTokenizer.from_pretrained(name)


def check_context(config: Any, vocabulary: VisualVocabulary, caption_tokens: int) -> None:
    """Raises: ModelError where the longest sample does not fit the LLM's positions."""
    frame = len(vocabulary.prompt_prefix) + len(vocabulary.prompt_suffix) + 3  # the two marks and EOS
    longest, limit = frame + caption_tokens + vocabulary.tokens_per_image, context_length(config)
    if longest > limit:
        raise ModelError(
            f"a sample takes up to {longest} tokens ({caption_tokens} of caption, {vocabulary.tokens_per_image} of "
            f"image), but the LLM's context is {limit}. Lower data.max_caption_tokens, or take another LLM."
        )


def context_length(config: Any) -> float:
    """Positions that the LLM was made for; infinite where its config does not say."""
    return getattr(config, "max_position_embeddings", None) or math.inf


def choose_trained(model: PreTrainedModel, mode: str, lora: Lora | None, offset: int) -> Any:
    """``model`` with the weights of ``mode`` set to train; for lora, the peft model around it."""
    if mode == "full":
        return model
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embed.weight is head.weight
    if mode == "rows":
        model.requires_grad_(False)
        for weight in {id(w): w for w in (embed.weight, head.weight)}.values():
            weight.requires_grad_(True)
            weight.register_hook(functools.partial(_only_new_rows, offset=offset))
        return model
    assert lora is not None
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    rows = list(range(offset, embed.weight.shape[0]))
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        trainable_token_indices={names[id(module)]: rows for module in ([embed] if tied else [embed, head])},
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _only_new_rows(gradient: Tensor, offset: int) -> Tensor:
    gradient = gradient.clone()
    gradient[:offset] = 0
    return gradient


def _card(
    recipe: FinetuneRecipe, report: TrainingReport, images: int, held_out: int, vocabulary: VisualVocabulary
) -> str:
    speed, size = report.sequences_per_second, recipe.train.batch_size
    loss = "none held out" if report.eval_loss is None else f"{report.eval_loss:.3f} nats on {held_out} images"
    return f"""---
library_name: transformers
pipeline_tag: text-to-image
tags: [v2flow]
---

# A language model that draws

`{recipe.llm}` taught {vocabulary.codebook_size:,} visual tokens by `v2flow finetune-llm`: given a caption, it writes
the {vocabulary.tokens_per_image} tokens of a picture, which `v2flow decode` turns into pixels. A plain Hugging Face
causal LM; the ids of the visual tokens and of the prompt stand in `config.json` under `v2flow`.

    v2flow generate "a red fox" --model FOLDER

| | |
|---|---|
| data | {", ".join(recipe.data.token_sets)} ({images:,} images) |
| image tokenizer | digest {vocabulary.tokenizer_digest} |
| parameters | {report.parameters:,} |
| trained | mode {recipe.mode}, {report.steps:,} steps of {size} samples |
| hardware, wall time | {describe_hardware()}, {report.minutes:.1f} minutes, {speed:.2f} samples/s |
| training loss at the end | {report.train_loss:.3f} nats an answer token |
| held-out loss | {loss}; ln K is {math.log(vocabulary.codebook_size):.3f} |
| made by | `v2flow finetune-llm` with `recipe.yaml` in this folder |
"""
