"""One position of a drawing as one compiled step: on a GPU, launching the kernels of a small LLM takes longer than
running them.

Shapes are the same at every position (a static cache, a mask over all of it), and tensors keep their addresses between
drawings of the same number of rows, so that one CUDA graph serves them all. Not measured on a GPU.
"""

from __future__ import annotations

import functools
import inspect
import threading
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import Cache


def logits_options(model: PreTrainedModel) -> dict[str, Any]:
    """The option by which a model computes logits only at the last position, if it has one."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def last_logits(
    model: PreTrainedModel, options: dict[str, Any], token_ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache
) -> Tensor:
    """Logits (B, V) after the last of token_ids (B, T), with the model's ``logits_options``."""
    inputs = dict(input_ids=token_ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return model(**inputs, use_cache=True, **options).logits[:, -1]


class StaticStep:
    """Logits (B, V) after one more token of each of B rows.

    Args:  options, of ``torch.compile``; the default records a CUDA graph.
    """

    def __init__(self, model: PreTrainedModel, **options: Any) -> None:
        options = options or {"mode": "reduce-overhead"}
        self.lock = threading.Lock()  # held during a drawing: drawings share the tensors
        step = functools.partial(last_logits, model, logits_options(model))
        self._step = torch.compile(step, fullgraph=True, dynamic=False, **options)
        self._cache: StaticCache | None = None  # of the last drawing

    def __call__(self, token_ids: Tensor, mask: Tensor, positions: Tensor, cache: StaticCache) -> Tensor:
        """Logits of token_ids and positions (B, 1), and a mask (B, T) over the whole ``cache``, from ``spread``."""
        torch.compiler.cudagraph_mark_step_begin()
        return self._step(token_ids, mask, positions, cache)

    def spread(self, cache: StaticCache, rows: Tensor) -> StaticCache:
        """``cache`` with its row ``rows[i]``, (B,), at i; in the last drawing's tensors if they have its shape."""
        shape = torch.Size((len(rows), *cache.layers[0].keys.shape[1:]))
        if self._cache is None or self._cache.layers[0].keys.shape != shape:
            cache.reorder_cache(rows)
            for layer in cache.layers:
                for tensor in (layer.keys, layer.values):
                    torch._dynamo.mark_static_address(tensor)
            self._cache = cache
            return cache
        for target, source in zip(self._cache.layers, cache.layers):
            target.keys.copy_(source.keys.index_select(0, rows))
            target.values.copy_(source.values.index_select(0, rows))
            target.cumulative_length.copy_(source.cumulative_length)
        return self._cache
