"""One position of a drawing as one compiled step: on a GPU, launching a small LLM's kernels takes longer than they do.

Shapes are the same at every position (a static cache, a mask over all of it), and tensors keep their places between
drawings of the same number of rows, so that a CUDA graph recorded once serves them all. Not measured on a GPU.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache


class StaticStep:
    """Logits (B, V) behind one more token of each of B rows.

    Args:  options, of ``torch.compile``; the default records a CUDA graph.
    """

    def __init__(self, model: PreTrainedModel, **options: Any) -> None:
        options = options or {"mode": "reduce-overhead"}
        self._model, self.lock = model, threading.Lock()  # held while rows are drawn: they share the tensors
        known = inspect.signature(model.forward).parameters
        self._extra = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._step = torch.compile(self._logits, fullgraph=True, dynamic=False, **options)
        self._cache: StaticCache | None = None  # of the last drawing

    def __call__(self, token_ids: Tensor, mask: Tensor, positions: Tensor, cache: StaticCache) -> Tensor:
        """Of token_ids and positions (B, 1), and mask (B, T) over the whole ``cache``, from ``spread``."""
        torch.compiler.cudagraph_mark_step_begin()
        return self._step(token_ids, mask, positions, cache)

    def _logits(self, token_ids: Tensor, mask: Tensor, positions: Tensor, cache: StaticCache) -> Tensor:
        inputs = dict(input_ids=token_ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        return self._model(**inputs, use_cache=True, **self._extra).logits[:, -1]

    def spread(self, cache: StaticCache, rows: Tensor) -> StaticCache:
        """``cache`` with its row ``rows[i]``, (B,), at i; in the last drawing's tensors where these have its shape."""
        shape = torch.Size((len(rows), *cache.layers[0].keys.shape[1:]))
        if self._cache is None or self._cache.layers[0].keys.shape != shape:
            cache.reorder_cache(rows)
            for layer in cache.layers:
                for tensor in (layer.keys, layer.values):
                    torch._dynamo.mark_static_address(tensor)
            self._cache = cache
            return cache
        for ours, given in zip(self._cache.layers, cache.layers):
            ours.keys.copy_(given.keys.index_select(0, rows))
            ours.values.copy_(given.values.index_select(0, rows))
            ours.cumulative_length.copy_(given.cumulative_length)
        return self._cache
