"""AdamW as the recipes describe it, and its learning rate at every step."""

from __future__ import annotations

import math

import torch
from torch import nn

from v2flow_cli.recipe.schema import Optimizer
from v2flow_cli.train.autoencoder import AutoencoderObjective
from v2flow_cli.train.tokenizer import TokenizerObjective


def build_optimizer(
    objective: AutoencoderObjective | TokenizerObjective, settings: Optimizer
) -> tuple[torch.optim.AdamW, dict[int, str]]:
    """AdamW with weight decay on matrices only, and the name of each parameter by ``id``."""
    free = objective.no_decay()
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    names: dict[int, str] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        names[id(parameter)] = name
        is_matrix = parameter.ndim >= 2 and not name.startswith(free)
        (decayed if is_matrix else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas), names


def learning_rate_at(step: int, settings: Optimizer, steps: int) -> float:
    """Linear warm-up, then constant or a half cosine to 2% of the peak at the last step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return settings.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
