"""Auxiliary loss: from a middle layer of the LLM, predict the histogram of the image's codes.

Departs (D15): the paper trains on the next token alone. The tokens before it predict it better than the caption does,
so a short training hardly learns what words mean. All tokens at once are another matter: the state of begin-of-image
in the middle of the LLM is read by the LLM's own output table (logit lens; deep supervision), and has to tell how
often each code occurs in its picture, and its picture from the others of the batch (InfoNCE, arXiv 1807.03748). The
upper half of the LLM, which draws, can look it up there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from v2flow_cli.errors import ModelError


def middle_layer(model: Any) -> nn.Module:
    """The first layer of the upper half of a causal LM.  Raises: ModelError where its layers cannot be found."""
    layers = getattr(model.get_decoder(), "layers", None)
    if not layers:
        name = type(model).__name__
        raise ModelError(f"{name}: its layers are not found, which caption_contrast needs. Set caption_contrast to 0.")
    return layers[len(layers) // 2]


def caption_contrast_loss(logits: Tensor, pictures: Tensor) -> Tensor:
    """Cross-entropy of the pictures' codes in nats a token, and InfoNCE between prompts and pictures, both ways.

    Args:  logits, of the codes, one row a prompt, (P, K); pictures, their ids (P, L) int64, -1 after a shorter one.
    """
    shown = pictures >= 0
    counts = logits.new_zeros(logits.shape).scatter_add_(1, pictures.clamp_min(0), shown.to(logits.dtype))
    lengths = counts.sum(1, keepdim=True)
    told = (counts / lengths) @ logits.log_softmax(-1).T  # (pictures, prompts), nats a token
    # The L tokens of a picture repeat each other; taken as the square root of L independent ones they stay comparable.
    scores, own = told * lengths.sqrt(), torch.arange(len(logits), device=logits.device)
    return -told.diagonal().mean() + (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
