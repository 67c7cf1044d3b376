"""Every rule that ties fields of a recipe together; ``schema.py`` checks names and types alone."""

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
    DrawSampling,
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
    """One sentence for each rule that ``recipe`` breaks: the field, what it is, what was expected.

    The rules that tie fields together are asked where every number is in its range.
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
        yield "data.aspects asks for shapes, but data.resident_px keeps squares alone; leave one of them out"
    if data.resident_px and data.resident_px < data.crop_size:
        yield (
            f"data.resident_px is {data.resident_px}; expected at least data.crop_size {data.crop_size}, so that crops "
            "are not enlarged, or 0 to read photos anew"
        )


def _tokenizer(recipe: TokenizerRecipe) -> Iterator[str]:
    yield from _data(recipe.data)
    if recipe.data.aspects and recipe.latents.cache:
        yield "data.aspects draws a shape for each batch, which latents.cache does not keep; leave one of them empty"
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
    if recipe.context is not None and not 0 <= recipe.context.mask_ratio_min <= 1:
        yield f"context.mask_ratio_min is {recipe.context.mask_ratio_min}; expected a share in [0, 1]"
    if not 0 <= recipe.flow.share <= 1:
        yield f"flow.share is {recipe.flow.share}; expected a share in [0, 1]"
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
        yield from _drawn_problems(recipe)
    if recipe.freeze_tokens and not recipe.init_from:
        yield "freeze_tokens is true, but init_from names no tokenizer whose tokens to keep"
    if recipe.latents.cache_crops < 1:
        yield f"latents.cache_crops is {recipe.latents.cache_crops}; expected at least 1"
    if ema and not 0 <= ema.usage_decay < 1:
        yield f"quantizer.usage_decay is {ema.usage_decay}; expected a number in [0, 1)"
    if isinstance(recipe.resampler, Registers):
        yield from _register_problems(recipe.resampler)
    if isinstance(recipe.quantizer, FSQ) and (not recipe.quantizer.levels or min(recipe.quantizer.levels) < 2):
        yield f"quantizer.levels is {list(recipe.quantizer.levels)}; expected numbers of at least 2"
    if recipe.sampling.solver == "ddim" and recipe.flow.formulation != "ddim":
        yield "sampling.solver is ddim, but flow.formulation is rectified_flow; use euler, heun or dpm++"
    if recipe.flow.formulation == "ddim" and recipe.sampling.solver != "ddim":
        yield f"flow.formulation is ddim, but sampling.solver is {recipe.sampling.solver}; use solver: ddim"
    yield from _loop_problems(recipe.train)


def _drawn_problems(recipe: TokenizerRecipe) -> Iterator[str]:
    """Of the losses in pixels."""
    loss = recipe.loss
    if not 0 < loss.pixel_share <= 1:
        yield f"loss.pixel_share is {loss.pixel_share}; expected a share above 0, at most 1"
    if loss.perceptual and not loss.features:
        yield 'loss.features is empty; loss.perceptual needs a file of network weights there, or "lpips"'
    if loss.pictures == "sampling" and not recipe.flow.share:
        yield "loss.pictures is sampling, but flow.share is 0; the velocity network is trained from a share above 0 on"
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
    yield from _lm_loop_problems(recipe.train)


def _drawing(recipe: FinetuneRecipe) -> Iterator[str]:
    data = recipe.data
    if (recipe.mode == "lora") != (recipe.lora is not None):
        yield f"mode is {recipe.mode} and lora is {recipe.lora}; expected a lora section for mode lora, and only there"
    if bool(data.token_sets) == bool(data.photos):
        yield "data.token_sets and data.photos: expected one of them, the other empty"
    for name in ("caption_dropout", "held_out_share", "image_to_text_share"):
        if not 0 <= getattr(data, name) < 1:
            yield f"data.{name} is {getattr(data, name)}; expected a share in [0, 1)"
    if not 0 <= data.token_noise <= 1 or not 0 < data.label_share <= 1:
        yield "data.token_noise must be a share in [0, 1], and data.label_share one in (0, 1]"
    if data.max_caption_tokens < 1 or data.shuffle_window < 1 or min(data.lengths, default=1) < 1:
        yield "data.max_caption_tokens, data.shuffle_window and data.lengths must be at least 1"
    if data.lengths and data.prefix_lengths != "none":
        yield (
            f"data.lengths is {list(data.lengths)} and data.prefix_lengths {data.prefix_lengths}; both choose how many "
            "tokens a sample keeps, so leave one of them out"
        )
    if recipe.sample_every < 0 or (recipe.sample_every and not any(p.strip() for p in recipe.sample_prompts)):
        yield "sample_every must be 0 or more, and sample_prompts not empty where pictures are drawn"
    yield from _sampling_problems(recipe.sampling)
    yield from _lm_loop_problems(recipe.train)


def _length_problems(resampler: Resampler, whole: bool) -> Iterator[str]:
    """``whole``: the decoder gives all patches at once, and has one length."""
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
    if registers.max_tokens < 1:
        yield f"resampler.max_tokens is {registers.max_tokens}; expected at least 1"
    elif registers.places == "grid" and math.isqrt(registers.max_tokens) ** 2 != registers.max_tokens:
        yield f"resampler.max_tokens is {registers.max_tokens}; places: grid needs a square number, such as 256"
    if len(registers.stem) not in (0, 2) or min(registers.stem, default=0) < 0:
        yield f"resampler.stem is {list(registers.stem)}; expected two numbers of blocks, or nothing"


def _sampling_problems(sampling: DrawSampling) -> Iterator[str]:
    if sampling.temperature < 0 or sampling.top_k < 0 or not 0 <= sampling.top_p <= 1 or sampling.guidance_scale < 0:
        yield (
            f"sampling is temperature {sampling.temperature}, top_k {sampling.top_k}, top_p {sampling.top_p}, "
            f"guidance_scale {sampling.guidance_scale}; expected numbers from 0 up, and top_p at most 1"
        )


def _loop_problems(train: TrainLoop) -> Iterator[str]:
    if train.batch_size % train.accumulate:
        yield f"train.batch_size is {train.batch_size}; expected a multiple of train.accumulate ({train.accumulate})"
    if not 0 <= train.ema_decay < 1:
        yield f"train.ema_decay is {train.ema_decay}; expected a number in [0, 1)"


def _lm_loop_problems(train: LMTrainLoop) -> Iterator[str]:
    if train.accumulate < 1 or train.batch_size < 1 or train.batch_size % train.accumulate:
        yield f"train.batch_size is {train.batch_size}; expected a multiple of accumulate ({train.accumulate})"
    if train.steps < 1:
        yield f"train.steps is {train.steps}; expected at least 1"


_RULES: dict[type, Callable[[Any], Iterator[str]]] = {
    AutoencoderRecipe: _autoencoder,
    TokenizerRecipe: _tokenizer,
    LMRecipe: _language_model,
    FinetuneRecipe: _drawing,
}
