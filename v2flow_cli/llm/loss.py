"""Cross-entropy at the labelled positions, with logits nowhere else: the output table is half a small LM's work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import masking_utils

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


def label_positions(labels: Tensor) -> Tensor:
    """Flat positions (M,) in (B, T) whose next label is learned. On a GPU the host waits for it: ask while on a CPU."""
    return F.pad(labels[:, 1:] != IGNORE, (0, 1)).flatten().nonzero()[:, 0]


def labelled_losses(
    model: nn.Module,
    head: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    early: tuple[nn.Module, Tensor] | None = None,
    positions: Tensor | None = None,
) -> LabelledLosses:
    """Cross-entropy of a causal LM where ``labels`` (B, T) are not IGNORE; position t predicts the label at t + 1.

    Args:  model, also one that DDP or peft wraps; head, its output table, which is made to see M positions only, and
           the states that ``early`` asks for: those that a layer reads at the flat positions (P,) of (B, T), at unit
           mean square; positions, what ``label_positions`` finds.
    """
    positions = label_positions(labels) if positions is None else positions
    targets = labels.flatten().index_select(0, positions + 1)
    states: list[Tensor] = []  # (B, T, D), that the early layer reads

    def keep(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        states.append(given[0] if given else named["hidden_states"])

    def choose(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        chosen = given[0].flatten(0, 1).index_select(0, positions)
        if early is not None:
            asked = states[0].flatten(0, 1).index_select(0, early[1])
            chosen = torch.cat([chosen, F.rms_norm(asked, asked.shape[-1:]).to(chosen.dtype)])
        return chosen, *given[1:]

    handles = [head.register_forward_pre_hook(choose)]
    if early is not None:
        handles.append(early[0].register_forward_pre_hook(keep, with_kwargs=True))
    try:
        with _one_sequence_a_row():
            outputs = model(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    logits, asked = outputs.logits.float().tensor_split([len(targets)])
    rows = positions // labels.shape[1]
    return LabelledLosses(rows, targets, F.cross_entropy(logits, targets, reduction="none"), logits, asked, outputs)


_FIND_PACKED = getattr(masking_utils, "find_packed_sequence_indices", None)


@contextlib.contextmanager
def _one_sequence_a_row() -> Iterator[None]:
    """transformers asks the device in every pass whether rows hold several sequences, and waits for its answer."""
    if _FIND_PACKED is None:
        yield
        return
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = _FIND_PACKED
