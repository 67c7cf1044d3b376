"""Cross-entropy at the labelled positions, with logits nowhere else: the output table is half a small LM's work."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100  # label of positions that are not learned


class LabelledLosses(NamedTuple):
    """Of the M labelled positions, row by row of the batch.  rows, targets, losses: (M,); logits: (M, V) float32.

    early: (P, V) float32, what the output table makes of the P states asked for in the middle of the LLM.
    """

    rows: Tensor  # of the batch
    targets: Tensor  # the ids to predict
    losses: Tensor  # nats
    logits: Tensor
    early: Tensor
    outputs: Any  # of the model


def labelled_losses(
    model: nn.Module,
    head: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    early: tuple[nn.Module, Tensor] | None = None,
) -> LabelledLosses:
    """Cross-entropy of a causal LM where ``labels`` (B, T) are not IGNORE; position t predicts the label at t + 1.

    Args:  model, also one that DDP or peft wraps; head, its output table, which is made to see M positions only, and
           the states that ``early`` asks for: those that a layer reads where (B, T) is True, at unit mean square.
    """
    learned = labels[:, 1:] != IGNORE
    targets = labels[:, 1:][learned]
    states: list[Tensor] = []  # (B, T, D), that the early layer reads

    def keep(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        states.append(given[0] if given else named["hidden_states"])

    def choose(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        chosen = given[0][:, :-1][learned]
        if early is not None:
            asked = states[0][early[1]]
            chosen = torch.cat([chosen, F.rms_norm(asked, asked.shape[-1:]).to(chosen.dtype)])
        return chosen, *given[1:]

    handles = [head.register_forward_pre_hook(choose)]
    if early is not None:
        handles.append(early[0].register_forward_pre_hook(keep, with_kwargs=True))
    try:
        outputs = model(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    logits, asked = outputs.logits.float().tensor_split([len(targets)])
    rows = learned.nonzero()[:, 0]
    return LabelledLosses(rows, targets, F.cross_entropy(logits, targets, reduction="none"), logits, asked, outputs)
