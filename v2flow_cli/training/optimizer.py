"""The optimizers of the recipes, and the learning rate at every step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from v2flow_cli.recipe.schema import Optimizer
from v2flow_cli.training.muon import Muon
from v2flow_cli.training.objectives.objective import Objective


def build_optimizer(objective: Objective, settings: Optimizer) -> tuple[torch.optim.AdamW, dict[int, str]]:
    """AdamW or Muon with weight decay on matrices only, and the name of each parameter by ``id``.

    Muon is for weights that act as one matrix: linear layers and ungrouped convolutions, but not the flow head.
    """
    free = objective.no_decay()
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []  # kernels of grouped convolutions, tables of registers
    plain: list[nn.Parameter] = []
    names: dict[int, str] = {}
    one_matrix = {
        id(part.weight)
        for part in objective.modules()
        if isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and part.groups == 1)
    }
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        names[id(parameter)] = name
        if parameter.ndim < 2 or name.startswith(free):
            plain.append(parameter)
        else:
            (matrices if id(parameter) in one_matrix else others).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": settings.weight_decay, "orthogonal": True},
        {"params": others, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    fused = fuses(next(objective.parameters()).device)
    common: dict[str, Any] = {"lr": settings.learning_rate, "betas": settings.betas, "fused": fused}
    if settings.kind == "muon":
        return Muon(groups, **common), names
    return torch.optim.AdamW(groups, **common), names


def fuses(device: torch.device) -> bool:
    """True if AdamW is one kernel for all weights, which can skip a bad step without the host."""
    return device.type == "cuda"


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
