"""Auxiliary loss: from a middle layer of the LLM, predict the histogram of the image's codes.

Departs (D15): the paper trains on the next token alone. The preceding image tokens predict it better than the caption
does, so a short training hardly learns what words mean. The histogram of all tokens depends on the caption alone: the
LLM's own output table is applied to the state of begin-of-image in a middle layer (logit lens; deep supervision), and
has to predict how often each code occurs in the image, and to tell this image from the others of the batch (InfoNCE,
arXiv 1807.03748). The upper layers can attend to that state while they draw.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from v2flow_cli.errors import ModelError


def middle_layer(model: Any) -> nn.Module:
    """The first layer of the upper half of a causal LM.  Raises: ModelError if its layers cannot be found."""
    layers = getattr(model.get_decoder(), "layers", None)
    if not layers:
        name = type(model).__name__
        raise ModelError(
            f"{name}: caption_contrast needs its list of layers, and it has none. Set caption_contrast to 0."
        )
    return layers[len(layers) // 2]


def caption_contrast_loss(logits: Tensor, image_ids: Tensor) -> Tensor:
    """Cross-entropy of the images' codes in nats a token, plus InfoNCE between prompts and images in both directions.

    Args:  logits, of the codes, one row a prompt, (P, K); image_ids (P, L) int64, -1 after the end of a shorter image.
    """
    valid = image_ids >= 0
    counts = logits.new_zeros(logits.shape).scatter_add_(1, image_ids.clamp_min(0), valid.to(logits.dtype))
    lengths = counts.sum(1, keepdim=True)
    log_likelihood = (counts / lengths) @ logits.log_softmax(-1).T  # (images, prompts), nats a token
    # The L tokens of an image are correlated; counted as sqrt(L) independent ones, images of all lengths compare.
    scores, labels = log_likelihood * lengths.sqrt(), torch.arange(len(logits), device=logits.device)
    return -log_likelihood.diagonal().mean() + (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2
