"""CPU threads shared out by image instead of by product."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def on_single_threads(compute: Callable[[Tensor], Tensor], images: Tensor) -> list[Tensor]:
    """``compute`` of each of ``images`` (B, ...) alone, (1, ...), on one CPU thread each; B at a time as threads allow.

    Sums round differently with the number of rows and of threads that share them. So done, a result depends on its
    image alone; and whole images are better to share out than their many small products.
    """
    threads = torch.get_num_threads()
    inference, autocast = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    dtype, gradients = torch.get_autocast_dtype("cpu"), torch.is_grad_enabled()

    def alone(image: Tensor) -> Tensor:
        torch.set_num_threads(1)
        with (  # the caller's, which threads do not inherit
            torch.inference_mode(inference),
            torch.set_grad_enabled(gradients),
            torch.autocast("cpu", dtype, enabled=autocast),
        ):
            return compute(image)

    try:
        if len(images) == 1 or threads == 1:
            return [alone(image) for image in images.split(1)]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(alone, images.split(1)))
    finally:
        torch.set_num_threads(threads)
