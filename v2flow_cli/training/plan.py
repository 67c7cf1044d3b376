"""Sizes, tokens and memory of a recipe, for ``train --dry-run``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from v2flow_cli.errors import ModelError, V2FlowError
from v2flow_cli.recipe import AutoencoderRecipe, TokenizerRecipe
from v2flow_cli.store.known_models import AUTOENCODERS, VOCABULARIES
from v2flow_cli.store.llm_table import vocab_shape
from v2flow_cli.store.stream import SampleStream
from v2flow_cli.tokenizer.autoencoder import V2FlowAutoencoderConfig
from v2flow_cli.tokenizer.latents import autoencoder_spec, load_autoencoder_spec
from v2flow_cli.tokenizer.v2flow import V2FlowTokenizer
from v2flow_cli.training.memory import check_batch_fits, training_bytes
from v2flow_cli.training.objectives.autoencoder import AutoencoderObjective
from v2flow_cli.training.objectives.objective import Objective
from v2flow_cli.training.objectives.tokenizer import TokenizerObjective, build_config, load_start
from v2flow_cli.training.output import check_output
from v2flow_cli.training.perceptual import load_perceptual


def plan(recipe: AutoencoderRecipe | TokenizerRecipe, resume: bool = False) -> dict[str, Any]:
    """Parameters, tokens an image, bits a pixel, memory, and passes over the data of ``recipe``; without weights.

    Memory is that of float32 with one training crop on one device. ``missing`` lists, a sentence each, why the run
    would not start: missing data, earlier stages that have not run, hub models that cannot be reached, an output that
    holds another run without ``resume``.
    """
    loop = recipe.train
    report: dict[str, Any] = {"kind": recipe.kind, "output": recipe.output}
    missing: list[str] = []
    if isinstance(recipe, AutoencoderRecipe):
        with torch.device("meta"):
            objective: Objective = (autoencoder := AutoencoderObjective(recipe))
        report["parameters"] = _count(autoencoder.model)
        report["encoder_parameters"] = _count(autoencoder.model.encoder)
        step = 0
    else:
        spec, shape, missing = named_models(recipe)
        recipe = _without_missing_features(recipe, missing)
        with torch.device("meta"):
            model = V2FlowTokenizer(build_config(recipe, spec, shape))
            objective = TokenizerObjective(recipe, model)
        report.update({f"{name}_parameters": _count(part) for name, part in model.named_children()})
        report["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        report["vocabulary"] = "none" if recipe.vocabulary.llm == "none" else f"{shape[0]} x {shape[1]}"
        size = recipe.image_size
        report["tokens_per_image"] = tokens = model.num_tokens(size, size)
        bits = tokens * (recipe.quantizer.codebook_size - 1).bit_length()
        report["bits_per_pixel"] = round(bits / size**2, 4)
        report["vocabulary_table_bytes"] = 0 if model.vocabulary is None else 4 * model.vocabulary.table.numel()
        step = recipe.quantizer.start_step  # quantised from here on
    memory = training_bytes(objective, recipe.data.crop_size, step)
    report.update({f"{name}_bytes": size for name, size in memory.items()})
    report["steps"], report["images"] = loop.steps, loop.steps * loop.batch_size
    missing += _unusable(recipe, resume)
    if missing:
        report["missing"] = missing
    return report


def named_models(recipe: TokenizerRecipe) -> tuple[dict[str, Any], tuple[int, int], list[str]]:
    """(autoencoder spec, shape of the vocabulary, problems) of the models that ``recipe`` names.

    Well-known hub ids are in a table, so they need no network. A missing model is replaced by an autoencoder of the
    default sizes, or by a table of 32,000 words.
    """
    missing: list[str] = []
    spec, shape = AUTOENCODERS.get(recipe.latents.autoencoder), VOCABULARIES.get(recipe.vocabulary.llm)
    if spec is None:
        try:
            spec, _ = load_autoencoder_spec(recipe.latents.autoencoder)
        except ModelError as error:
            missing.append(str(error))
            spec = autoencoder_spec(V2FlowAutoencoderConfig())
    if shape is None:
        shape = (32_000, recipe.quantizer.code_size)
        if recipe.vocabulary.llm != "none":
            try:
                shape = vocab_shape(recipe.vocabulary.llm)
            except ModelError as error:
                missing.append(str(error))
    return spec, shape, missing


def _without_missing_features(recipe: TokenizerRecipe, missing: list[str]) -> TokenizerRecipe:
    """``recipe`` without the losses in features if their network is missing, which is added to ``missing``."""
    if recipe.loss.needs_features:
        try:
            load_perceptual(recipe.loss.features)
        except ModelError as error:
            missing.append(str(error))
            return dataclasses.replace(recipe, loss=dataclasses.replace(recipe.loss, perceptual=0.0, adversarial=0.0))
    return recipe


def _unusable(recipe: AutoencoderRecipe | TokenizerRecipe, resume: bool) -> list[str]:
    """Problems with the data, the tokenizer to start from, and the output."""
    checks: list[Callable[[], object]] = [
        lambda: SampleStream(recipe.data.sources, seed=0, output=recipe.output),
        lambda: check_output(recipe.output, resume),
        lambda: check_batch_fits(recipe.train, 3 * recipe.data.crop_size**2, f"crops of {recipe.data.crop_size} px"),
    ]
    if isinstance(recipe, TokenizerRecipe) and recipe.init_from:
        checks.append(lambda: load_start(recipe))
    problems = []
    for check in checks:
        try:
            check()
        except V2FlowError as error:
            problems.append(str(error))
    return problems


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
