"""Cross-entropy at the labelled positions, with logits for no others: they are half of a small LM's work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import masking_utils

IGNORE = -100  # label of positions without a loss


class LabelledLosses(NamedTuple):
    """Results at the M labelled positions in the order of the batch's rows.

    rows, targets, losses: (M,); logits: (M, V) float32; early_logits: (P, V) float32, the output table applied to P
    states of a middle layer.
    """

    rows: Tensor  # of the batch
    targets: Tensor  # the ids to predict
    losses: Tensor  # nats
    logits: Tensor
    early_logits: Tensor
    outputs: Any  # of the model


def label_positions(labels: Tensor) -> Tensor:
    """Flat positions (M,) in (B, T) whose next label has a loss. Call it on the CPU: on a GPU the host would wait."""
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

    Args:  model, possibly wrapped by DDP or peft; head, its output table, which is applied to the M labelled positions
           and to the states of ``early``: the inputs of a layer at the flat positions (P,) of (B, T), normalised to
           unit mean square; positions, the result of ``label_positions``.
    """
    positions = label_positions(labels) if positions is None else positions
    targets = labels.flatten().index_select(0, positions + 1)
    states: list[Tensor] = []  # (B, T, D), inputs of the early layer

    def record_states(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def select_rows(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows = args[0].flatten(0, 1).index_select(0, positions)
        if early is not None:
            early_rows = states[0].flatten(0, 1).index_select(0, early[1])
            rows = torch.cat([rows, F.rms_norm(early_rows, early_rows.shape[-1:]).to(rows.dtype)])
        return rows, *args[1:]

    handles = [head.register_forward_pre_hook(select_rows)]
    if early is not None:
        handles.append(early[0].register_forward_pre_hook(record_states, with_kwargs=True))
    try:
        with _no_packed_sequences():
            outputs = model(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    logits, early_logits = outputs.logits.float().tensor_split([len(targets)])
    rows, losses = positions // labels.shape[1], F.cross_entropy(logits, targets, reduction="none")
    return LabelledLosses(rows, targets, losses, logits, early_logits, outputs)


_FIND_PACKED = getattr(masking_utils, "find_packed_sequence_indices", None)


@contextlib.contextmanager
def _no_packed_sequences() -> Iterator[None]:
    """Skip transformers' test for packed sequences, in which the host waits for the GPU at every pass."""
    if _FIND_PACKED is None:
        yield
        return
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = _FIND_PACKED
