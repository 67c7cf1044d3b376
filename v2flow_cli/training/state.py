"""The state of a training run: exactly what a checkpoint needs for an exact resume.

It has no random state: every step seeds the generators from (seed, step, rank), and every crop from its ordinal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class TrainState:
    """Counters of a run; the same numbers on every rank."""

    step: int = 0  # optimizer steps done
    images_seen: int = 0
    bad_steps: int = 0  # non-finite losses skipped
    seconds: float = 0.0  # wall time over all runs

    def as_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass
class WeightAverage:
    """Exponential moving average of a module's trainable weights, with a short warm-up.

    Buffers that a part lists in ``averaged_buffers`` are averaged with them, because running statistics fit the
    averaged weights only if they lag equally.
    """

    decay: float
    weights: dict[str, Tensor] = field(default_factory=dict)
    averaged: list[Tensor] = field(default_factory=list)  # of the module, which changes them in place

    @classmethod
    def of(cls, module: nn.Module, decay: float) -> WeightAverage:
        tensors = dict(_averaged(module))
        return cls(decay, {name: p.detach().clone().float() for name, p in tensors.items()}, list(tensors.values()))

    @torch.no_grad()
    def update(self, step: int, good: Tensor | None = None) -> None:
        """Average in the weights after ``step`` steps; nothing changes if ``good``, a tensor (), is False."""
        # At first the average would be mostly initial values, so the window grows with the step.
        rate = 1 - min(self.decay, (1 + step) / (10 + step))
        weights, current = list(self.weights.values()), [p.detach().float() for p in self.averaged]
        if good is None:
            torch._foreach_lerp_(weights, current, rate)
        else:
            torch._foreach_lerp_(weights, current, [rate * good.float()] * len(weights))

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, parameter in _averaged(module):
            parameter.copy_(self.weights[name])


def _averaged(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
    for part_name, part in module.named_modules():
        for name in getattr(part, "averaged_buffers", ()):
            yield f"{part_name}.{name}", getattr(part, name)


def flatten_optimizer(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: ``names`` maps ``id(parameter)`` to its name."""
    flat = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                flat[f"{names[id(parameter)]}/{key}"] = torch.as_tensor(value)
    return flat


def restore_optimizer(optimizer: torch.optim.Optimizer, names: dict[int, str], flat: dict[str, Tensor]) -> None:
    """The inverse of ``flatten_optimizer``, in place and on the parameters' devices."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            prefix = f"{names[id(parameter)]}/"
            state = {key[len(prefix) :]: value for key, value in flat.items() if key.startswith(prefix)}
            if state:
                optimizer.state[parameter] = {
                    # Fused kernels count on the device, the others on the host.
                    key: value.clone()
                    if key == "step" and not group.get("fused")
                    else value.to(parameter.device, copy=True)
                    for key, value in state.items()
                }


def moving_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers that a training step changes (codebook, running statistics), not of frozen tables."""
    frozen = ("model.vocabulary.", "model.latents.")
    return {name: buffer.clone() for name, buffer in module.named_buffers() if not name.startswith(frozen)}


@torch.no_grad()
def restore_buffers(module: nn.Module, saved: dict[str, Tensor], good: Tensor | None = None) -> None:
    """Undo a skipped step's changes of the buffers; with ``good``, a tensor (), only if that is False."""
    buffers = dict(module.named_buffers())
    for name, value in saved.items():
        buffers[name].copy_(value if good is None else torch.where(good, buffers[name], value))
