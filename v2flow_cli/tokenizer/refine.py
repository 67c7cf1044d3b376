"""Better token ids for one image: gradient steps on its vectors, through the decoder.

An encoder finds vectors for any image in one pass, and these are not the best ones for a given image (the amortisation
gap, arXiv 1801.03558). As in learned image compression (arXiv 2006.04240), the vectors of an image can be optimised
further, with all weights as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from v2flow_cli.tokenizer.quantizer import TokenQuantizer

# Of Adam: the first step size, in standard deviations of the codes in each dimension; the share of it at the end; and a
# shorter memory than in training, for the few steps. docs/flextok.md has the settings that were tried.
STEP_SIZE, LAST_SHARE, BETAS = 0.2, 0.1, (0.7, 0.99)


def refine_ids(vectors: Tensor, quantizer: TokenQuantizer, error: Callable[[Tensor], Tensor], steps: int) -> Tensor:
    """The ids (B, n) with the smallest error among those of ``vectors`` (B, n, D) and of ``steps`` Adam steps.

    ``error`` maps the embeddings of quantised vectors to one error per image (B,). The gradient passes the rounding as
    in the training (straight-through). Images do not influence each other.
    Raises:  ValueError for a negative number of steps.
    """
    if steps < 0:
        raise ValueError(f"{steps} steps to refine ids; expected 0 or more")
    with torch.inference_mode(False), torch.enable_grad():
        start = vectors.float().clone()
        unit = quantizer.vectors.float().std(0)
        change = torch.zeros_like(start, requires_grad=True)
        optimizer = torch.optim.Adam([change], lr=STEP_SIZE, betas=BETAS)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, LAST_SHARE, max(steps, 1))
        best_ids, best = torch.zeros_like(start[..., 0], dtype=torch.int64), start.new_full((len(start),), torch.inf)
        for step in range(steps + 1):
            quantized = quantizer(start + unit * change)
            errors = error(quantized.embeddings)
            better = (errors.detach() < best) | (step == 0)  # the encoder's ids also if their error is not finite
            best = torch.where(better, errors.detach(), best)
            best_ids = torch.where(better[:, None], quantized.token_ids, best_ids)
            if step < steps:
                (change.grad,) = torch.autograd.grad(errors.sum(), [change])
                optimizer.step()
                schedule.step()
        return best_ids
