"""Teach a causal LM the visual tokens (section 2.4): load, extend the vocabulary, train, save a plain folder.

The loop is transformers' Trainer, under plain Python, ``accelerate launch`` or torchrun alike. What is ours: the
loss on the answer alone, with text and visual parts logged apart, and what is trained:

    full    every weight (the paper)
    lora    adapters on every linear layer and the new rows (peft), merged into the folder that is saved
    rows    the new rows alone
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from v2flow_cli.errors import DataError, ModelError
from v2flow_cli.llm.caption_contrast import caption_contrast_loss, middle_layer
from v2flow_cli.llm.load import context_length, load_config, load_llm, loading
from v2flow_cli.llm.loss import labelled_losses
from v2flow_cli.llm.pairs import Part, Samples, check_data, count_tokens, log_data
from v2flow_cli.llm.rehearsal import rehearse
from v2flow_cli.llm.sampling import store_sampling
from v2flow_cli.llm.sequences import collate, prompt_frame
from v2flow_cli.llm.vocabulary import (
    VisualVocabulary,
    add_visual_tokens,
    check_extendable,
    extend_tables,
    table_rows,
    text_ids,
)
from v2flow_cli.recipe.load import dump_recipe
from v2flow_cli.recipe.schema import FinetuneRecipe, Lora
from v2flow_cli.runtime.device import describe_hardware
from v2flow_cli.runtime.extras import extra
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.training.card import front_matter, source_name
from v2flow_cli.training.llm_trainer import (
    LMTrainer,
    Log,
    RunClock,
    TrainingReport,
    estimate,
    optimizer_class,
    run,
    save_folder,
    training_arguments,
)
from v2flow_cli.training.output import alone_in_output, check_output
from v2flow_cli.training.sample_pictures import SamplePictures

HELD_OUT_MAX = 512  # images that the held-out loss is taken on
WIDTHS = 64  # positions; on a GPU batches are as wide as a multiple of it, so that a compiled step is reused
TOKEN_COUNTS = "token_counts.npy"  # (K,): how often each code was trained on, beside the weights


class DrawingTrainer(LMTrainer):
    """Cross-entropy of the labelled positions, z-loss and caption contrast; their parts are logged apart.

    The loss of a step is the mean over its labels in all micro-batches and processes, however they are split. The
    caption contrast is against the other pictures of the same micro-batch.
    """

    def __init__(
        self,
        *args: Any,
        vocabulary: VisualVocabulary,
        z_loss: float = 0.0,
        caption_contrast: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.vocabulary, self.z_loss, self.caption_contrast = vocabulary, z_loss, caption_contrast
        self.middle = middle_layer(self.model) if caption_contrast else None
        self.model_accepts_loss_kwargs = True  # compute_loss divides by all labels of the step, so Trainer must not
        self.head = self.model.get_output_embeddings()
        self.router_weight = getattr(self.model.config, "router_aux_loss_coef", 0.0)
        # Losses and labels of text, of visual tokens, of contrasts, since the last log line.
        self.sums = torch.zeros(3, 2, device=self.args.device)

    def get_train_dataloader(self) -> DataLoader:
        """Every process reads its own batches of the one order, from where a resumed run goes on."""
        batch = self._train_batch_size
        self.train_dataset.part = Part(self.first_sample, batch, self.args.process_index, self.args.world_size)
        # With a generator of its own the loader draws nothing from the one that a resume restores.
        own = torch.Generator()
        return DataLoader(
            self.train_dataset,
            batch_size=batch,
            collate_fn=self.data_collator,
            generator=own,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Tensor]:
        """The micro-batches of a step, and how many labels it has over all processes."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        self.keys = [key for batch in batches for key in batch["keys"]]
        count = torch.tensor(sum(len(batch["positions"]) for batch in batches))
        return batches, self.accelerator.reduce(count.to(self.args.device, non_blocking=True))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        early = None
        if self.middle is not None and model.training and len(inputs["image_starts"]):
            early = self.middle, inputs["image_starts"]
        found = labelled_losses(model, self.head, inputs["input_ids"], inputs["labels"], early, inputs["positions"])
        losses = found.losses
        if model.training:
            visual = self.vocabulary.is_visual(found.targets).float()
            for row, share in enumerate((1 - visual, visual)):
                self._count(row, losses.detach() * share, share)
        if self.z_loss:
            losses = losses + self.z_loss * found.logits.logsumexp(-1).square()
        if num_items_in_batch is None:
            loss = losses.mean()
        else:  # gradients are averaged over processes, so the sum over them is asked for
            loss = losses.sum() * self.accelerator.num_processes / num_items_in_batch
        if early is not None:
            first = self.vocabulary.visual_token_offset
            codes = found.early_logits[:, first : first + self.vocabulary.codebook_size]
            contrast = caption_contrast_loss(codes, inputs["image_ids"])
            self._count(2, contrast.detach(), torch.ones_like(contrast))
            loss = loss + self.caption_contrast * contrast / self.args.gradient_accumulation_steps
        if self.router_weight and getattr(found.outputs, "aux_loss", None) is not None:
            loss = loss + self.router_weight * found.outputs.aux_loss / self.args.gradient_accumulation_steps
        return (loss, found.outputs) if return_outputs else loss

    def _count(self, row: int, losses: Tensor, labels: Tensor) -> None:
        self.sums[row] += torch.stack([losses.sum(), labels.sum()])

    def sums_by_name(self) -> dict[str, Tensor]:
        return {**super().sums_by_name(), "sums": self.sums}

    def restore_sums(self, sums: dict[str, Tensor]) -> None:
        super().restore_sums(sums)
        self.sums = sums["sums"].to(self.args.device, copy=True)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            sums = self.accelerator.reduce(self.sums.to(self.args.device)).tolist()
            answers = sums[:2]  # what Trainer took the mean of has the other losses in it
            logs["loss"] = sum(total for total, _ in answers) / max(1, sum(count for _, count in answers))
            for name, (total, count) in zip(("text", "visual", "caption_contrast"), sums):
                if count:
                    logs[f"{name}_loss"] = total / count
            self.sums.zero_()
        super().log(logs, *args, **kwargs)


@alone_in_output
def finetune(recipe: FinetuneRecipe, *, log: Log, resume: bool = False, approximate: bool = False) -> TrainingReport:
    """Fine-tune ``recipe.llm`` on the recipe's token sets and save a model that draws to ``recipe.output``.

    Raises:  ModelError for an LLM or tokenizer that cannot be loaded or extended, an output that already holds a model
             (without ``resume``), sequences longer than the LLM's context, and a loss that is not finite;
             TokenFileError and DataError for token sets that are missing, damaged or of another tokenizer.
    """
    check_output(recipe.output, resume)
    image_tokenizer = V2FlowTokenizer.from_pretrained(recipe.tokenizer)
    length, images = check_data(recipe.data, image_tokenizer, recipe.output)
    arguments = training_arguments(recipe.optimizer, recipe.train, recipe.output, ignore_data_skip=True)
    # Adapters leave the LLM's weights alone, so those may stay in bf16; what is trained is kept in float32.
    dtype = torch.bfloat16 if recipe.mode == "lora" and arguments.bf16 else torch.float32
    checked = check_llm(recipe, image_tokenizer, length)
    model, text_tokenizer = load_llm(recipe.llm, dtype)
    codebook = image_tokenizer.codebook if recipe.new_rows == "codebook" else None
    codebook_size = image_tokenizer.config.codebook_size
    captions = recipe.data.image_to_text_share > 0
    if checked.vocabulary is not None:
        captions = captions or checked.vocabulary.captions
        vocabulary = dataclasses.replace(checked.vocabulary, captions=captions, cache=checked.cache)
        first_new_row = vocabulary.visual_token_offset
    else:
        first_new_row, rows = table_rows(model)
        offset = text_ids(text_tokenizer, rows)
        log(extend_tables(model, len(text_tokenizer), codebook_size, codebook, recipe.train.seed, offset))
        vocabulary = VisualVocabulary(
            visual_token_offset=offset,
            codebook_size=codebook_size,
            begin_image_id=offset + codebook_size,
            end_image_id=offset + codebook_size + 1,
            tokens_per_image=length,
            tokenizer_digest=image_tokenizer.token_digest,
            prompt_prefix=checked.prefix,
            prompt_suffix=checked.suffix,
            eos_id=text_tokenizer.eos_token_id,
            flexible=image_tokenizer.flexible,
            captions=captions,
            cache=checked.cache,
        )
        text_tokenizer = add_visual_tokens(text_tokenizer, offset, codebook_size)
    model.config.v2flow = vocabulary.record()
    set_seed(recipe.train.seed)  # adapters start from random numbers
    model = choose_trained(model, recipe.mode, recipe.lora, first_new_row)
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log(f"{images:,} images of {length} tokens; {model.num_parameters():,} parameters, {trained:,} of them trained")

    if arguments.process_index == 0:
        log_data(recipe.data, recipe.output, log)
    samples = functools.partial(Samples, recipe.data, text_tokenizer, vocabulary, recipe.train.seed)
    samples = functools.partial(samples, image_tokenizer=image_tokenizer.to(arguments.device), output=recipe.output)
    held_out = list(itertools.islice(samples(held_out=True), HELD_OUT_MAX))
    if recipe.train.eval_every and not held_out:
        raise DataError("train.eval_every asks for held-out losses, but data.held_out_share leaves no image for them.")
    pad_id = text_tokenizer.pad_token_id or text_tokenizer.eos_token_id or 0
    clock = RunClock(recipe.train, dump_recipe(recipe), log)
    trainer = DrawingTrainer(
        model=model,
        args=arguments,
        train_dataset=samples(),
        eval_dataset=held_out,
        data_collator=functools.partial(
            collate, pad_id=pad_id, multiple=WIDTHS if arguments.device.type == "cuda" else 1
        ),
        optimizer_cls_and_kwargs=optimizer_class(recipe.optimizer),
        vocabulary=vocabulary,
        z_loss=recipe.z_loss,
        caption_contrast=recipe.caption_contrast,
    )
    if recipe.sample_every:
        prompts, place = recipe.sample_prompts, recipe.output
        trainer.add_callback(
            SamplePictures(prompts, recipe.sample_every, place, image_tokenizer, text_tokenizer, vocabulary, log)
        )
    run(trainer, clock, recipe.output, resume, log, approximate)
    report = TrainingReport(
        output=recipe.output,
        parameters=model.num_parameters(),
        processes=trainer.args.world_size,
        steps=trainer.state.global_step,
        minutes=clock.seconds / 60,
        sequences_per_second=clock.sequences_per_second(trainer.state.global_step),
        train_loss=clock.last_loss,
        eval_loss=trainer.evaluate()["eval_loss"] if held_out else None,
    )
    plain = trainer.model.merge_and_unload() if recipe.mode == "lora" else trainer.model
    store_sampling(plain, recipe.sampling)
    card = _card(recipe, report, images, len(held_out), vocabulary)
    files: dict[str, str | bytes] = {"README.md": card, "recipe.yaml": dump_recipe(recipe)}
    if recipe.data.token_sets and trainer.is_world_process_zero():
        files[TOKEN_COUNTS] = _npy(count_tokens(recipe.data, codebook_size))
    save_folder(trainer, plain, text_tokenizer, recipe.output, recipe.train.save_dtype, files)
    return report


def plan(recipe: FinetuneRecipe, resume: bool = False) -> dict[str, int | float]:
    """Sizes and rough estimates of a run, from configs alone.  Raises: as ``finetune`` for inputs that do not fit."""
    check_output(recipe.output, resume)
    image_tokenizer = V2FlowTokenizer.from_pretrained(recipe.tokenizer)
    length, images = check_data(recipe.data, image_tokenizer, recipe.output)
    checked = check_llm(recipe, image_tokenizer, length)
    with loading(recipe.llm), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(checked.config)
    if checked.vocabulary is not None:
        first_new_row = checked.vocabulary.visual_token_offset
    else:
        first_new_row, rows = table_rows(model)
        offset = text_ids(checked.text_tokenizer, rows)
        model.resize_token_embeddings(offset + image_tokenizer.config.codebook_size + 2, mean_resizing=False)
    tables = {id(t.weight): t.weight for t in (model.get_input_embeddings(), model.get_output_embeddings())}
    vocab_size = len(model.get_input_embeddings().weight)
    parameters = model.num_parameters()
    model = choose_trained(model, recipe.mode, recipe.lora, first_new_row)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if recipe.mode == "rows":
        trained -= sum(first_new_row * table.shape[1] for table in tables.values())
    config = checked.config.get_text_config(decoder=True)
    return {"images": images, "tokens_per_image": length} | estimate(
        recipe.train, parameters, trained, checked.longest, vocab_size, config
    )


@dataclass(frozen=True)
class CheckedLLM:
    """What is known of an LLM before its weights are loaded."""

    config: Any
    text_tokenizer: PreTrainedTokenizerBase
    vocabulary: VisualVocabulary | None  # of one that draws already, and goes on with its rows
    prefix: tuple[int, ...]  # ids before the caption
    suffix: tuple[int, ...]  # and after it
    longest: int  # tokens of a sample
    cache: str  # the kind that it draws with


def check_llm(recipe: FinetuneRecipe, image_tokenizer: V2FlowTokenizer, length: int) -> CheckedLLM:
    """``recipe.llm`` without its weights, if it can be taught pictures of ``length`` tokens and draw them.

    Raises:  ModelError for one whose architecture, text tokenizer, chat template or context does not allow it.
    """
    config, text_tokenizer = load_config(recipe.llm)
    checkpointing = recipe.train.gradient_checkpointing
    cache = rehearse(config, recipe.llm, contrast=bool(recipe.caption_contrast), checkpointing=checkpointing)
    vocabulary = None
    if recipe.new_rows == "kept":
        vocabulary = _kept_vocabulary(config, recipe, image_tokenizer)
        prefix, suffix = vocabulary.prompt_prefix, vocabulary.prompt_suffix
    else:
        check_extendable(text_tokenizer)
        prefix, suffix = prompt_frame(text_tokenizer)
    frame = len(prefix) + len(suffix)
    longest = check_context(config, frame, recipe.data.max_caption_tokens, length)
    return CheckedLLM(config, text_tokenizer, vocabulary, prefix, suffix, longest, cache)


def _kept_vocabulary(config: Any, recipe: FinetuneRecipe, image_tokenizer: V2FlowTokenizer) -> VisualVocabulary:
    """That of an LLM that draws already.  Raises: ModelError if it does not, or draws another tokenizer's tokens."""
    vocabulary = VisualVocabulary.of(config, recipe.llm)
    vocabulary.check_tokenizer(image_tokenizer.token_digest, recipe.llm, "--set tokenizer=FOLDER")
    return vocabulary


def check_context(config: Any, frame: int, caption_tokens: int, image_tokens: int) -> int:
    """Tokens of the longest sample.  Raises: ModelError where it does not fit the LLM's positions.

    Args:  frame, tokens of the chat template around a caption.
    """
    longest, limit = frame + 3 + caption_tokens + image_tokens, context_length(config)  # the two marks and EOS
    if longest > limit:
        raise ModelError(
            f"a sample takes up to {longest} tokens ({caption_tokens} of caption, {image_tokens} of image), but the "
            f"LLM's context is {limit}. Lower data.max_caption_tokens, or take another LLM."
        )
    return longest


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
    with extra("lora", "peft", "mode: lora"):
        from peft import LoraConfig, get_peft_model
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


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _only_new_rows(gradient: Tensor, offset: int) -> Tensor:
    gradient = gradient.clone()
    gradient[:offset] = 0
    return gradient


def _card(
    recipe: FinetuneRecipe, report: TrainingReport, images: int, held_out: int, vocabulary: VisualVocabulary
) -> str:
    speed, size = report.sequences_per_second, recipe.train.batch_size
    hardware = f"{report.processes} process(es) on {describe_hardware()}"
    loss = "none held out" if report.eval_loss is None else f"{report.eval_loss:.3f} nats on {held_out} images"
    sources = recipe.data.token_sets or recipe.data.photos
    head = front_matter(
        recipe.card,
        recipe.output,
        library="transformers",
        task="text-to-image",
        made_from=(recipe.llm, recipe.tokenizer),
        data=sources,
        metrics={} if report.eval_loss is None else {"loss": report.eval_loss},
        split="validation",
    )
    return f"""{head}
# A language model that draws

`{recipe.llm}` taught {vocabulary.codebook_size:,} visual tokens by `v2flow finetune-llm`: given a caption, it writes
the {vocabulary.tokens_per_image} tokens of a picture, which `v2flow decode` turns into pixels. A plain Hugging Face
causal LM; the ids of the visual tokens and of the prompt stand in `config.json` under `v2flow`.

    v2flow generate "a red fox" --model FOLDER

| | |
|---|---|
| data | {", ".join(map(source_name, sources))} ({images:,} images) |
| image tokenizer | digest {vocabulary.tokenizer_digest} |
| parameters | {report.parameters:,} |
| trained | mode {recipe.mode}, {report.steps:,} steps of {size} samples |
| hardware, wall time | {hardware}, {report.minutes:.1f} minutes, {speed:.2f} samples/s |
| training loss at the end | {report.train_loss:.3f} nats an answer token |
| held-out loss | {loss}; ln K is {math.log(vocabulary.codebook_size):.3f} |
| made by | `v2flow finetune-llm` with `recipe.yaml` in this folder |
"""
