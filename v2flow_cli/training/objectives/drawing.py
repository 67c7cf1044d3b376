"""Train a causal LM on visual tokens (section 2.4): load, extend the vocabulary, train, save a folder.

The loop is transformers' Trainer, with plain Python, ``accelerate launch`` or torchrun. Added here: the loss on the
answer alone, with text and visual parts logged separately, and the selection of trained weights:

    full    every weight (the paper)
    lora    adapters on every linear layer and the new rows (peft), merged into the folder that is saved
    rows    only the new rows
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, set_seed

from v2flow_cli.errors import DataError
from v2flow_cli.llm.caption_contrast import caption_contrast_loss, middle_layer
from v2flow_cli.llm.load import load_llm, loading
from v2flow_cli.llm.loss import labelled_losses
from v2flow_cli.llm.pairs import Part, Samples, check_data, count_tokens, log_data
from v2flow_cli.llm.sampling import store_sampling
from v2flow_cli.llm.sequences import collate
from v2flow_cli.llm.vocabulary import (
    VisualVocabulary,
    add_visual_tokens,
    extend_tables,
    table_rows,
    text_ids,
)
from v2flow_cli.recipe.load import dump_recipe
from v2flow_cli.recipe.schema import FinetuneRecipe
from v2flow_cli.runtime.device import describe_hardware
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.training.card import front_matter, source_name
from v2flow_cli.training.llm_folder import save_folder
from v2flow_cli.training.llm_setup import check_llm, choose_trained
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
from v2flow_cli.training.memory import check_batch_fits
from v2flow_cli.training.output import alone_in_output, check_output
from v2flow_cli.training.sample_pictures import SamplePictures

HELD_OUT_MAX = 512  # images of the held-out loss
WIDTHS = 64  # positions; on a GPU the width of a batch is a multiple of it, so that a compiled step is reused
TOKEN_COUNTS = "token_counts.npy"  # (K,): how often each code occurs in the training data


class DrawingTrainer(LMTrainer):
    """Cross-entropy of the labelled positions, z-loss and caption contrast; their parts are logged separately.

    The loss of a step is the mean over its labels in all micro-batches and processes. The caption contrast is against
    the other images of the same micro-batch.
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
        self.model_accepts_loss_kwargs = True  # compute_loss divides by all labels of the step; Trainer must not
        self.head = self.model.get_output_embeddings()
        self.router_weight = getattr(self.model.config, "router_aux_loss_coef", 0.0)
        # Losses and labels of text, of visual tokens, of contrasts, since the last log line.
        self.sums = torch.zeros(3, 2, device=self.args.device)

    def get_train_dataloader(self) -> DataLoader:
        """Every process reads its own batches of the common order, from the position of a resumed run."""
        batch = self._train_batch_size
        self.train_dataset.part = Part(self.first_sample, batch, self.args.process_index, self.args.world_size)
        # With its own generator the loader draws nothing from the one that a resume restores.
        return DataLoader(
            self.train_dataset,
            batch_size=batch,
            collate_fn=self.data_collator,
            generator=torch.Generator(),
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Tensor]:
        """The micro-batches of a step, and the number of its labels over all processes."""
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
        out = labelled_losses(model, self.head, inputs["input_ids"], inputs["labels"], early, inputs["positions"])
        losses = out.losses
        if model.training:
            visual = self.vocabulary.is_visual(out.targets).float()
            for row, share in enumerate((1 - visual, visual)):
                self._count(row, losses.detach() * share, share)
        if self.z_loss:
            losses = losses + self.z_loss * out.logits.logsumexp(-1).square()
        if num_items_in_batch is None:
            loss = losses.mean()
        else:  # the sum over processes, because gradients are averaged over them
            loss = losses.sum() * self.accelerator.num_processes / num_items_in_batch
        if early is not None:
            first = self.vocabulary.visual_token_offset
            codes = out.early_logits[:, first : first + self.vocabulary.codebook_size]
            contrast = caption_contrast_loss(codes, inputs["image_ids"])
            self._count(2, contrast.detach(), torch.ones_like(contrast))
            loss = loss + self.caption_contrast * contrast / self.args.gradient_accumulation_steps
        if self.router_weight and getattr(out.outputs, "aux_loss", None) is not None:
            loss = loss + self.router_weight * out.outputs.aux_loss / self.args.gradient_accumulation_steps
        return (loss, out.outputs) if return_outputs else loss

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
            answers = sums[:2]  # Trainer's own mean includes the other losses
            logs["loss"] = sum(total for total, _ in answers) / max(1, sum(count for _, count in answers))
            for name, (total, count) in zip(("text", "visual", "caption_contrast"), sums):
                if count:
                    logs[f"{name}_loss"] = total / count
            self.sums.zero_()
        super().log(logs, *args, **kwargs)


@alone_in_output
def finetune(recipe: FinetuneRecipe, *, log: Log, resume: bool = False, approximate: bool = False) -> TrainingReport:
    """Fine-tune ``recipe.llm`` on the recipe's data, and save a model that draws to ``recipe.output``.

    Raises:  ModelError for an LLM or tokenizer that cannot be loaded or extended, an output that already holds a model
             (without ``resume``), sequences longer than the LLM's context, and a loss that is not finite;
             TokenFileError and DataError for token sets that are missing, damaged or of another tokenizer.
    """
    check_output(recipe.output, resume)
    image_tokenizer = V2FlowTokenizer.from_pretrained(recipe.tokenizer)
    length, images = check_data(recipe.data, image_tokenizer, recipe.output)
    check_batch_fits(recipe.train, 8 * length, f"images of {length} token ids")
    arguments = training_arguments(recipe.optimizer, recipe.train, recipe.output, ignore_data_skip=True)
    # With adapters the LLM's weights are frozen, so they may be bf16; trained weights are float32.
    dtype = torch.bfloat16 if recipe.mode == "lora" and arguments.bf16 else torch.float32
    checked = check_llm(recipe, image_tokenizer, length)
    model, text_tokenizer = load_llm(recipe.llm, dtype)
    choose_attention(model, checked.longest, arguments.device)
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
    samples = functools.partial(samples, step_size=recipe.train.batch_size)
    held_out = list(itertools.islice(samples(held_out=True), HELD_OUT_MAX))
    if recipe.train.eval_every and not held_out:
        raise DataError("train.eval_every needs held-out images, but data.held_out_share leaves none.")
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
        prompts, every = recipe.sample_prompts, recipe.sample_every
        trainer.add_callback(
            SamplePictures(prompts, every, recipe.output, image_tokenizer, text_tokenizer, vocabulary, log)
        )
    run(trainer, clock, recipe.output, resume, log, approximate)
    report = trainer.report(recipe.output, model.num_parameters(), bool(held_out))
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
    check_batch_fits(recipe.train, 8 * length, f"images of {length} token ids")
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


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


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
        base_models=(recipe.llm, recipe.tokenizer),
        data=sources,
        metrics={} if report.eval_loss is None else {"loss": report.eval_loss},
        split="validation",
    )
    return f"""{head}
# A language model that draws

`{recipe.llm}`, trained on {vocabulary.codebook_size:,} visual tokens by `v2flow finetune-llm`: for a caption, it
generates the {vocabulary.tokens_per_image} tokens of an image, which the image tokenizer decodes. It is a Hugging Face
causal LM; `config.json` stores the ids of the visual tokens and of the prompt under `v2flow`.

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
| trained by | `v2flow finetune-llm` with `recipe.yaml` in this folder |
"""
