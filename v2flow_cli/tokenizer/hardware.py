"""Which device and which number format to use, decided by what the hardware is fast at."""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from v2flow_cli.errors import V2FlowError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(name: str = "auto") -> torch.device:
    """The torch device called ``name``; ``auto`` takes a GPU where there is one, and each process of a launch its own.

    Raises:  V2FlowError for a device that this machine does not have.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise V2FlowError(
            f"--device {name}: not available here ({str(error).splitlines()[0]}). Use --device auto or cpu."
        ) from None
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``fp32``, ``bf16``, or ``auto``: bf16 where ``device`` multiplies it at least 1.5 times faster than float32.

    Raises:  V2FlowError for any other name.
    """
    if name == "auto":
        return torch.bfloat16 if _bf16_is_fast(device.type) else torch.float32
    if name not in DTYPES:
        raise V2FlowError(f"--dtype {name}: expected auto, fp32 or bf16.")
    return DTYPES[name]


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


def join_launch() -> None:
    """Let the processes of a launch find each other where there is no GPU: call it before accelerate looks around.

    Without this word torchrun's processes on CPUs each take themselves for the only one, and write the same files.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def describe_hardware() -> str:
    """One process's hardware in a few words, for model cards and benches."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"


@functools.cache
def _bf16_is_fast(device_type: str) -> bool:
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False

    # CPUs without AMX or AVX512-BF16 emulate bf16 up to 100 times slower than float32, and no public flag
    # tells the two apart on every platform: 256 x 256 products (33 MFLOP) tell in milliseconds.
    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(256, 256, dtype=dtype)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.float32) > 1.5 * seconds(torch.bfloat16)
