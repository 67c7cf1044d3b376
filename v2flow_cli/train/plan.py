"""What a recipe would build, before anything is trained: sizes and tokens, for ``train --dry-run``."""

from __future__ import annotations

from typing import Any

import torch

from v2flow_cli.errors import ModelError
from v2flow_cli.recipe import AutoencoderRecipe, TokenizerRecipe
from v2flow_cli.store.vocab_table import load_vocab_embeddings
from v2flow_cli.tokenizer.latents import load_autoencoder_spec
from v2flow_cli.tokenizer.v2flow import V2FlowTokenizer
from v2flow_cli.train.autoencoder import AutoencoderObjective
from v2flow_cli.train.tokenizer import build_config


def plan(recipe: AutoencoderRecipe | TokenizerRecipe) -> dict[str, Any]:
    """Parameters, tokens an image, bits a pixel and passes over the data of ``recipe``; builds no weights.

    The autoencoder and the LLM that a tokenizer recipe names are read where they exist; where they do not (a
    recipe whose earlier stages have not run), that is said under ``missing``.
    """
    loop = recipe.train
    report: dict[str, Any] = {"kind": recipe.kind, "output": recipe.output}
    missing: list[str] = []
    if isinstance(recipe, AutoencoderRecipe):
        with torch.device("meta"):
            autoencoder = AutoencoderObjective(recipe).model
        report["parameters"] = _count(autoencoder)
        report["encoder_parameters"] = _count(autoencoder.encoder)
    else:
        spec, shape = {"class": "pixels"}, (32_000, recipe.quantizer.code_size)
        try:
            spec, _ = load_autoencoder_spec(recipe.latents.autoencoder)
        except ModelError as error:
            missing.append(str(error))
        if recipe.vocabulary.llm != "none":
            try:
                shape = tuple(load_vocab_embeddings(recipe.vocabulary.llm).shape)
            except ModelError as error:
                missing.append(str(error))
        with torch.device("meta"):
            model = V2FlowTokenizer(build_config(recipe, spec, shape))
        report.update({f"{name}_parameters": _count(part) for name, part in model.named_children()})
        report["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        report["vocabulary"] = "none" if recipe.vocabulary.llm == "none" else f"{shape[0]} x {shape[1]}"
        size = recipe.image_size
        report["tokens_per_image"] = tokens = model.num_tokens(size, size)
        bits = tokens * (recipe.quantizer.codebook_size - 1).bit_length()
        report["bits_per_pixel"] = round(bits / size**2, 4)
    report["steps"], report["images"] = loop.steps, loop.steps * loop.batch_size
    if missing:
        report["missing"] = missing
    return report


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
