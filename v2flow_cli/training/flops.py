"""Floating-point operations of a training and the peak of the GPU, for the share of peak in a budget's table."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from v2flow_cli.recipe import AutoencoderRecipe, LMRecipe, TokenizerRecipe
from v2flow_cli.recipe.schema import Recipe
from v2flow_cli.tokenizer.v2flow import V2FlowTokenizer
from v2flow_cli.training.objectives.autoencoder import AutoencoderObjective
from v2flow_cli.training.objectives.objective import Objective
from v2flow_cli.training.objectives.tokenizer import TokenizerObjective, build_config
from v2flow_cli.training.plan import named_models

# FLOP/s in dense bf16 products, from data sheets; the first entry that the GPU's name contains counts.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_flop_per_s(device: torch.device) -> float:
    """Peak FLOP/s of a device in dense bf16 products; 0 if it is not known, as for CPUs."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for card, peak in PEAKS.items() if card in name), 0.0)


def training_flop(recipe: Recipe) -> float:
    """FLOP of one training image or text block, forward and backward, from shapes alone; 0 if not known."""
    if isinstance(recipe, LMRecipe):
        model = recipe.model
        head = model.hidden_size // model.num_heads
        attention = model.hidden_size * head * 2 * (model.num_heads + model.num_kv_heads)
        layers = model.num_layers * (attention + 3 * model.hidden_size * model.intermediate_size)
        return 6.0 * (layers + model.vocab_size * model.hidden_size) * recipe.block_size
    if not isinstance(recipe, AutoencoderRecipe | TokenizerRecipe):
        return 0.0
    if isinstance(recipe, AutoencoderRecipe):
        step = 0
        with torch.device("meta"):
            objective: Objective = AutoencoderObjective(recipe)
    else:
        step = recipe.quantizer.start_step
        spec, shape, _ = named_models(recipe)
        with torch.device("meta"):
            objective = TokenizerObjective(recipe, V2FlowTokenizer(build_config(recipe, spec, shape)))
    images = torch.empty(1, 3, recipe.data.crop_size, recipe.data.crop_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        objective.train()(images, step)["loss"].backward()
    return float(counter.get_total_flops())
