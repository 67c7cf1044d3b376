"""Memory of one training image, from shapes alone: the pass runs on tensors without data."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from v2flow_cli.errors import RecipeError, reason_of
from v2flow_cli.recipe.schema import LMTrainLoop, TrainLoop
from v2flow_cli.training.muon import copies_kept
from v2flow_cli.training.objectives.objective import Objective
from v2flow_cli.training.optimizer import build_optimizer


def training_bytes(objective: Objective, size: int, step: int) -> dict[str, int]:
    """Bytes in float32 of the state of a training, and ``one_image``: peak memory per crop, forward and backward.

    Args:    objective, on the meta device, which gets gradients; size, of the crop in pixels.
    """
    weights = sum(_bytes(x) for x in (*objective.parameters(), *objective.buffers()))
    trained = [p for p in objective.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    images = torch.empty(1, 3, size, size, device="meta")
    objective.train()
    with LiveBytes() as live, _FusedAttention():
        objective(images, step)["loss"].backward()
    gradients = sum(map(_bytes, trained))
    optimizer, _ = build_optimizer(objective, objective.recipe.optimizer)
    optimizer_bytes = gradients  # the average of the weights
    for group in optimizer.param_groups:
        optimizer_bytes += copies_kept(optimizer, group) * sum(map(_bytes, group["params"]))
    parts = {"weights": weights, "gradients": gradients, "optimizer": optimizer_bytes}
    return {**parts, "one_image": live.peak, "peak_with_one_image": sum(parts.values()) + live.peak}


def check_batch_fits(loop: TrainLoop | LMTrainLoop, sample_bytes: int, what: str) -> None:
    """Refuse a batch whose inputs alone are larger than the machine's memory; one that passes may be too large too.

    Args:    sample_bytes, of one sample as it is read; what, its name: "crops of 256 px".
    Raises:  RecipeError.
    """
    samples = loop.batch_size // loop.accumulate // int(os.environ.get("WORLD_SIZE", "1"))
    if not hasattr(os, "sysconf"):  # Windows
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if samples * sample_bytes > memory:
        raise RecipeError(
            f"train.batch_size is {loop.batch_size:,}: {samples:,} {what} at a time take "
            f"{samples * sample_bytes / 2**30:,.0f} GiB, and this machine has {memory / 2**30:,.0f} GiB of memory. "
            "Make train.batch_size smaller, or train.accumulate larger."
        )


@contextlib.contextmanager
def building_model() -> Iterator[None]:
    """Raises: RecipeError for a model of the block that does not fit into the memory of the machine or device."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # of torch's allocators, which have no class in common
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        raise RecipeError(
            f"the model does not fit into the memory ({reason_of(error)}). Make its widths or depths smaller."
        ) from error


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live tensors created within it (``now``), and their maximum (``peak``)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._add(result.untyped_storage(), inputs)
        return results

    def _add(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        key = storage._cdata
        if key in self._alive or key in inputs:  # a view, or an in-place result
            return
        self._alive.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


class _FusedAttention(TorchFunctionMode):
    """Replaces torch's unfused attention, which it uses for tensors without data, but which no training device uses."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * 4
