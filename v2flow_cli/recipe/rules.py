"""Every rule between the fields of a recipe. ``load.py`` checks names and types, ``ranges.py`` single numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from v2flow_cli.recipe.ranges import out_of_range
from v2flow_cli.recipe.schema import (
    FSQ,
    MAX_ASPECT,
    AutoencoderRecipe,
    Context,
    FinetuneRecipe,
    FlowTransformer,
    ImageData,
    LMRecipe,
    LMTrainLoop,
    Quantizer,
    Recipe,
    Registers,
    Resampler,
    TokenizerRecipe,
    TrainLoop,
)


def broken_rules(recipe: Recipe) -> Iterator[str]:
    """One sentence for each rule that ``recipe`` breaks: the field, its value, the expected value.

    The rules between fields apply only if every number is in its range.
    """
    yield from list(out_of_range(recipe)) or _RULES[type(recipe)](recipe)


def _autoencoder(recipe: AutoencoderRecipe) -> Iterator[str]:
    if recipe.data.crop_size % 8:
        yield f"data.crop_size is {recipe.data.crop_size}; the autoencoder needs a multiple of 8"
    for name in ("encoder_width", "decoder_width"):
        if getattr(recipe.model, name) % 2:
            yield f"model.{name} is {getattr(recipe.model, name)}; expected an even number (half is used too)"
    yield from _data(recipe.data)
    yield from _loop_problems(recipe.train)


def _data(data: ImageData) -> Iterator[str]:
    if not all(1 / MAX_ASPECT <= aspect <= MAX_ASPECT for aspect in data.aspects):
        yield f"data.aspects is {list(data.aspects)}; expected width / height from {1 / MAX_ASPECT} to {MAX_ASPECT}"
    if data.aspects and data.resident_px:
        yield "data.aspects sets other shapes, but data.resident_px stores only squares; leave one of them out"
    if data.resident_px and data.resident_px < data.crop_size:
        yield (
            f"data.resident_px is {data.resident_px}; expected at least data.crop_size {data.crop_size}, so that crops "
            "are not enlarged, or 0 to read the photos at each step"
        )


def _tokenizer(recipe: TokenizerRecipe) -> Iterator[str]:
    yield from _data(recipe.data)
    if recipe.data.aspects and recipe.latents.cache:
        yield "data.aspects draws a shape for each batch, but latents.cache stores one shape; leave one of them empty"
    whole = isinstance(recipe.flow, FlowTransformer)
    if whole != (recipe.context is None):
        yield (
            f"flow.kind is {recipe.flow.kind} and context is {'null' if recipe.context is None else 'a section'}; "
            "kind: mlp needs the context section, kind: transformer needs context: null"
        )
    if whole and recipe.sampling.num_mask_steps != 1:
        yield f"sampling.num_mask_steps is {recipe.sampling.num_mask_steps}; a flow transformer has 1 round"
    transformers = {"context": recipe.context, "resampler": recipe.resampler, "flow": recipe.flow}
    for name, part in transformers.items():
        if isinstance(part, Context | Registers | FlowTransformer) and part.hidden_size % (4 * part.num_heads):
            yield (
                f"{name}.hidden_size is {part.hidden_size}; with {part.num_heads} heads it must be "
                "a multiple of 4 x num_heads (2D rotary positions)"
            )
    if not 0 < recipe.data.min_scale <= recipe.data.max_scale <= 1:
        yield (
            f"data.min_scale is {recipe.data.min_scale} and data.max_scale {recipe.data.max_scale}; expected "
            "0 < min_scale <= max_scale <= 1"
        )
    if recipe.vocabulary.temperature <= 0:
        yield f"vocabulary.temperature is {recipe.vocabulary.temperature}; expected a number above 0"
    if isinstance(recipe.resampler, Resampler):
        yield from _length_problems(recipe.resampler, whole)
    ema = recipe.quantizer if isinstance(recipe.quantizer, Quantizer) else None
    if ema and ema.kmeans_steps and not 0 < ema.kmeans_steps <= ema.start_step - 2:
        yield (
            f"quantizer.kmeans_steps is {ema.kmeans_steps}; expected 0 or at most start_step - 2 "
            f"({ema.start_step} - 2): k-means needs vectors to start from"
        )
    if recipe.loss.draws:
        yield from _image_loss_problems(recipe)
    if recipe.freeze_tokens and not recipe.init_from:
        yield "freeze_tokens is true, but init_from names no tokenizer"
    if isinstance(recipe.resampler, Registers):
        yield from _register_problems(recipe.resampler)
    if isinstance(recipe.quantizer, FSQ) and (not recipe.quantizer.levels or min(recipe.quantizer.levels) < 2):
        yield f"quantizer.levels is {list(recipe.quantizer.levels)}; expected numbers of at least 2"
    if recipe.sampling.solver == "ddim" and recipe.flow.formulation != "ddim":
        yield "sampling.solver is ddim, but flow.formulation is rectified_flow; use euler, heun or dpm++"
    if recipe.flow.formulation == "ddim" and recipe.sampling.solver != "ddim":
        yield f"flow.formulation is ddim, but sampling.solver is {recipe.sampling.solver}; use solver: ddim"
    yield from _loop_problems(recipe.train)


def _image_loss_problems(recipe: TokenizerRecipe) -> Iterator[str]:
    """Rules of the losses in pixels."""
    loss = recipe.loss
    if not 0 < loss.pixel_share <= 1:
        yield f"loss.pixel_share is {loss.pixel_share}; expected a share above 0, at most 1"
    if loss.needs_features and not loss.features:
        key = "perceptual" if loss.perceptual else "adversarial"
        yield f'loss.features is empty; loss.{key} needs a file of network weights there, or "lpips"'
    if loss.pictures == "sampling" and not recipe.flow.share:
        yield "loss.pictures is sampling, but flow.share is 0, which does not train the velocity network"
    if loss.pictures == "sampling" and recipe.sampling.guidance_scale != 1:
        yield (
            f"loss.pictures is sampling, but sampling.guidance_scale is {recipe.sampling.guidance_scale}; training "
            "draws without guidance, so use 1"
        )
    if loss.pictures == "sampling" and recipe.sampling.num_mask_steps != 1:
        yield (
            f"loss.pictures is sampling, but sampling.num_mask_steps is {recipe.sampling.num_mask_steps}; training "
            "draws in one round, so use 1"
        )


def _language_model(recipe: LMRecipe) -> Iterator[str]:
    model = recipe.model
    if model.vocab_size < 259:
        yield f"model.vocab_size is {model.vocab_size}; expected at least 259: bytes and special tokens"
    if model.hidden_size % (2 * model.num_heads):
        yield f"model.hidden_size is {model.hidden_size}; expected a multiple of {2 * model.num_heads} (2 x heads)"
    if model.num_heads % model.num_kv_heads:
        yield f"model.num_heads is {model.num_heads}; expected a multiple of {model.num_kv_heads} (num_kv_heads)"
    if not 1 < recipe.block_size <= model.max_positions:
        yield f"block_size is {recipe.block_size}; expected 2 to model.max_positions {model.max_positions}"
    yield from _loop_problems(recipe.train)


def _drawing(recipe: FinetuneRecipe) -> Iterator[str]:
    data = recipe.data
    if (recipe.mode == "lora") != (recipe.lora is not None):
        yield f"mode is {recipe.mode} and lora is {recipe.lora}; expected a lora section for mode lora, and only there"
    if bool(data.token_sets) == bool(data.photos):
        yield "data.token_sets and data.photos: expected one of them, the other empty"
    if not data.label_share:
        yield "data.label_share is 0; expected a share above 0, at most 1"
    if min(data.lengths, default=1) < 1:
        yield f"data.lengths is {list(data.lengths)}; expected numbers of at least 1"
    if data.lengths and data.prefix_lengths != "none":
        yield (
            f"data.lengths is {list(data.lengths)} and data.prefix_lengths {data.prefix_lengths}; both set the number "
            "of tokens of a sample, so leave one of them out"
        )
    if recipe.sample_every and not any(prompt.strip() for prompt in recipe.sample_prompts):
        yield f"sample_prompts is empty, but sample_every is {recipe.sample_every}; expected a prompt, or 0"
    yield from _loop_problems(recipe.train)


def _length_problems(resampler: Resampler, whole: bool) -> Iterator[str]:
    """``whole``: the decoder computes all patches at once, and has one length."""
    first, others = resampler.tokens_per_256px, resampler.other_tokens_per_256px
    if first not in (64, 128, 256):
        yield f"resampler.tokens_per_256px is {first}; expected 64, 128 or 256"
    elif others and (len({first, *others}) <= len(others) or not {64, 128}.issuperset(others) or max(others) > first):
        yield (
            f"resampler.other_tokens_per_256px is {list(others)}; expected 64, 128 or both, each below "
            f"tokens_per_256px ({first})"
        )
    if others and whole:
        yield "resampler.other_tokens_per_256px needs flow.kind: mlp; a flow transformer decodes one length"
    shares = resampler.other_shares
    if len(shares) != len(others) or min(shares, default=0.0) < 0 or sum(shares) >= 1:
        yield (
            f"resampler.other_shares is {list(shares)}; expected one share of the steps for each of "
            f"other_tokens_per_256px ({list(others)}), together below 1"
        )


def _register_problems(registers: Registers) -> Iterator[str]:
    if registers.places == "grid" and math.isqrt(registers.max_tokens) ** 2 != registers.max_tokens:
        yield f"resampler.max_tokens is {registers.max_tokens}; places: grid needs a square number, such as 256"
    if len(registers.stem) not in (0, 2) or min(registers.stem, default=0) < 0:
        yield f"resampler.stem is {list(registers.stem)}; expected two numbers of blocks, or nothing"


def _loop_problems(train: TrainLoop | LMTrainLoop) -> Iterator[str]:
    if train.batch_size % train.accumulate:
        yield f"train.batch_size is {train.batch_size}; expected a multiple of train.accumulate ({train.accumulate})"


_RULES: dict[type, Callable[[Any], Iterator[str]]] = {
    AutoencoderRecipe: _autoencoder,
    TokenizerRecipe: _tokenizer,
    LMRecipe: _language_model,
    FinetuneRecipe: _drawing,
}
