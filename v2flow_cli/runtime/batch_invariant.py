"""CPU threads shared out by image instead of by product."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_STARTING = threading.Lock()


def on_single_threads(compute: Callable[[Tensor], Tensor], images: Tensor) -> list[Tensor]:
    """``compute`` of each of ``images`` (B, ...) alone, (1, ...), on one CPU thread each; B at a time as threads allow.

    Sums round differently with the number of rows and of threads that share them. So done, a result depends on its
    image alone; and whole images are better to share out than their many small products. Calls may overlap.
    """
    inference, autocast = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    dtype, gradients = torch.get_autocast_dtype("cpu"), torch.is_grad_enabled()

    def alone(image: Tensor) -> Tensor:
        with (  # the caller's, which threads do not inherit
            torch.inference_mode(inference),
            torch.set_grad_enabled(gradients),
            torch.autocast("cpu", dtype, enabled=autocast),
        ):
            return compute(image)

    pool = _single_threads(len(images))
    if pool is None:
        return [alone(image) for image in images.split(1)]
    with pool:
        return list(pool.map(alone, images.split(1)))


def _single_threads(most: int) -> ThreadPoolExecutor | None:
    """As many threads as torch uses here, at most ``most``, with one torch thread each; None where it uses one.

    ``torch.set_num_threads`` sets the caller's number and that of every thread that is new to torch. So the workers
    are all started before the old number is put back, by one call at a time; otherwise another call, or a thread that
    starts meanwhile, would take the 1 for the process's own number and keep it.
    """
    with _STARTING:
        threads = torch.get_num_threads()
        if threads == 1:
            return None
        workers = min(threads, most)
        started = threading.Barrier(workers)

        def start() -> None:
            torch.get_num_threads()  # a thread's first use of torch takes over the process's number, so before the 1
            torch.set_num_threads(1)
            started.wait()

        pool = ThreadPoolExecutor(workers, initializer=start)
        try:
            list(pool.map(lambda _: None, range(workers)))
        finally:
            torch.set_num_threads(threads)
        return pool
