"""Cross-entropy at the labelled positions, with logits nowhere else: the output table is half a small LM's work."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100  # label of positions that are not learned


class LabelledLosses(NamedTuple):
    """Of the M labelled positions, row by row of the batch.  rows, targets, losses: (M,); logits: (M, V) float32."""

    rows: Tensor  # of the batch
    targets: Tensor  # the ids to predict
    losses: Tensor  # nats
    logits: Tensor
    outputs: Any  # of the model


def labelled_losses(model: nn.Module, head: nn.Module, input_ids: Tensor, labels: Tensor) -> LabelledLosses:
    """Cross-entropy of a causal LM where ``labels`` (B, T) are not IGNORE; position t predicts the label at t + 1.

    Args:  model, also one that DDP or peft wraps; head, its output table, which is made to see M positions only.
    """
    learned = labels[:, 1:] != IGNORE
    targets = labels[:, 1:][learned]
    handle = head.register_forward_pre_hook(lambda _, given: (given[0][:, :-1][learned], *given[1:]))
    try:
        outputs = model(input_ids=input_ids, use_cache=False)
    finally:
        handle.remove()
    logits = outputs.logits.float()
    rows = learned.nonzero()[:, 0]
    return LabelledLosses(rows, targets, F.cross_entropy(logits, targets, reduction="none"), logits, outputs)
