"""Results on a CPU that do not depend on the other rows of a batch: an image or a sequence is computed alone."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor, nn

_STARTING = threading.Lock()
_POOLS = threading.local()  # .mine: the _Pools of one calling thread


class _Pools(dict[int, ThreadPoolExecutor]):
    """The pools of one calling thread, by the number of torch threads. They end with it.

    That is said outright: an error that is kept somewhere refers to frames that refer to the pool.
    """

    def __del__(self) -> None:
        for pool in self.values():
            pool.shutdown(wait=False)


def on_single_threads(compute: Callable[[Tensor], Tensor], images: Tensor, size: int = 1) -> list[Tensor]:
    """``compute`` of each of ``images`` (B, ...) alone, (1, ...), each on one CPU thread, in parallel.

    ``size`` passes that many images to each call, for a ``compute`` whose results do not depend on the number of rows.

    Sums round differently with the number of rows and of threads. Here a result depends only on its own image, and one
    image per thread is faster than sharing the many small products of each image. Calls may overlap.
    """
    inference, autocast = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    dtype, gradients = torch.get_autocast_dtype("cpu"), torch.is_grad_enabled()

    def alone(image: Tensor) -> Tensor:
        with (  # the caller's modes, which threads do not inherit
            torch.inference_mode(inference),
            torch.set_grad_enabled(gradients),
            torch.autocast("cpu", dtype, enabled=autocast),
        ):
            return compute(image)

    parts = images.split(size)
    pool = _single_threads()
    if pool is None:
        return [alone(part) for part in parts]
    futures = [pool.submit(alone, part) for part in parts]
    wait(futures)  # all of them, also if one fails: none may use the caller's images after this call
    # Removed one by one: an error refers to the frames it has passed, and these must not refer to its future. Such a
    # cycle would keep the images, the pool and its threads alive until the garbage collector runs.
    return [futures.pop(0).result() for _ in parts]


def _single_threads() -> ThreadPoolExecutor | None:
    """A pool of as many threads as torch uses here, with one torch thread each; None if torch uses one.

    Each calling thread keeps its pool: new threads would each allocate a heap and the buffers of the mathematics
    libraries, tens of megabytes a batch.

    ``torch.set_num_threads`` sets the number of the calling thread and of every thread that is new to torch. All
    workers are therefore started before the old number is restored, by one call at a time; otherwise another call, or a
    thread that starts meanwhile, would read 1 as the process's number and keep it.
    """
    with _STARTING:
        threads = torch.get_num_threads()
        if threads == 1:
            return None
        pools: _Pools = _POOLS.__dict__.setdefault("mine", _Pools())
        if threads in pools:
            return pools[threads]
        started = threading.Barrier(threads)

        def start() -> None:
            torch.get_num_threads()  # a thread's first use of torch copies the process's number
            torch.set_num_threads(1)
            started.wait()

        pool = ThreadPoolExecutor(threads, initializer=start)
        try:
            list(pool.map(lambda _: None, range(threads)))
        finally:
            torch.set_num_threads(threads)
        pools[threads] = pool
        return pool


if hasattr(os, "register_at_fork"):  # not on Windows; a fork has none of its parent's threads
    os.register_at_fork(after_in_child=lambda: _POOLS.__dict__.clear())


@contextlib.contextmanager
def each_row_alone(model: nn.Module) -> Iterator[None]:
    """On a CPU, ``model``'s linear layers multiply each row of a (B, 1, D) input alone.

    On a single thread (see ``on_single_threads``) a row then rounds alike in a batch of any size. It is for sampling,
    where sequences grow by one position: 8 of them take about twice as long as in one product, and less than half as
    long as one after the other. Other inputs and other devices are computed as usual.
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and layer.weight.device.type == "cpu"]
    for layer in layers:
        layer.forward = functools.partial(_linear, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _linear(layer: nn.Linear, input: Tensor) -> Tensor:
    if input.ndim != 3 or input.shape[1] != 1:
        return nn.functional.linear(input, layer.weight, layer.bias)
    if input.dtype != torch.float32:  # bmm of half precision is not optimised: 5 times slower than one linear a row
        return torch.cat([nn.functional.linear(row, layer.weight, layer.bias) for row in input.split(1)])
    product = torch.bmm(input, layer.weight.t().expand(len(input), -1, -1))
    return product if layer.bias is None else product + layer.bias
