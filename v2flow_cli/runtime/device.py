"""The device, number format and batch size that suit the hardware."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import threading
import time
from collections.abc import Iterator

import torch

from v2flow_cli.errors import V2FlowError, foreign_errors

# At 256 px: the scores of 256 tokens against 16,384 codes and 16,384 words, and the autoencoder's activations.
BYTES_AN_IMAGE = 64 * 2**20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(name: str = "auto") -> torch.device:
    """The torch device called ``name``; with ``cuda`` each process of a launch gets its own GPU.

    ``auto`` is ``cuda`` if there is a GPU, else ``mps`` or ``cpu``.
    Raises:  V2FlowError for a device that this machine does not have.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if name == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    advice = "Use --device auto or cpu."
    with foreign_errors(f"--device {name}: not available here", advice, V2FlowError):
        device = torch.device(name)
        torch.empty(0, device=device)
    if device.type == "meta":
        raise V2FlowError(f"--device {name}: holds no numbers. {advice}")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``fp32``, ``bf16``, or ``auto``: bf16 if ``device`` multiplies it at least 1.5 times faster than float32.

    Raises:  V2FlowError for any other name.
    """
    if name == "auto":
        return torch.bfloat16 if _bf16_is_fast(device.type) else torch.float32
    if name not in DTYPES:
        raise V2FlowError(f"--dtype {name}: expected auto, fp32 or bf16.")
    return DTYPES[name]


def cpu_cores() -> int:
    """CPU cores that this process may use; the processes of a launch on one machine share the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def pick_batch_size(device: torch.device, image_size: int) -> int:
    """How many images of ``image_size`` pixels to encode or decode at a time.

    On a CPU 8: each image uses one core, and more images only use memory. On a GPU the largest power of two up to 256
    that fits into half of its free memory.
    """
    if device.type != "cuda":
        return 8
    free, _ = torch.cuda.mem_get_info(device)
    images = free / 2 / (BYTES_AN_IMAGE * (image_size / 256) ** 2)
    return max(1, min(256, 2 ** int(math.log2(max(1.0, images)))))


def without_autocast(tensor: torch.Tensor) -> torch.autocast:
    """A context without autocast on the device of ``tensor``."""
    kind = tensor.device.type
    # "meta" (a dry run) has no autocast. torch.amp.is_autocast_available would tell, but torch 2.11 cannot trace it.
    return torch.autocast("cpu" if kind == "meta" else kind, enabled=False)


def draw_noise(data: torch.Tensor) -> torch.Tensor:
    """Standard normal noise of the shape of ``data``, in float32: in bf16 torch 2.11 draws other numbers."""
    return torch.randn_like(data, dtype=torch.float32)


@contextlib.contextmanager
def inference(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """No gradients, and products in ``dtype``: how every command computes."""
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield


_TF32_LOCK = threading.Lock()
_tf32_uses: list[tuple[object, bool, bool]] = []  # of each open context: its identity, matrix products, convolutions


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """A context in which float32 products on a GPU may (or may not) round their factors to 10 bits of mantissa.

    torch's own default allows it in convolutions. Training allows it everywhere, because only training uses those
    numbers; results for the user (ids, images) are computed without it. The setting is global: that of the context
    entered last holds, in all threads, and after the last exit the original setting is restored.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    entry = (object(), allowed, allowed)
    with _TF32_LOCK:
        if not _tf32_uses:
            _tf32_uses.append((object(), matmul.allow_tf32, cudnn.allow_tf32))
        _tf32_uses.append(entry)
        matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        with _TF32_LOCK:
            _tf32_uses.remove(entry)
            _, matmul.allow_tf32, cudnn.allow_tf32 = _tf32_uses[-1]
            if len(_tf32_uses) == 1:
                _tf32_uses.clear()


def describe_hardware() -> str:
    """The hardware of this process in a few words, for model cards and benches."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"


@functools.cache
def _bf16_is_fast(device_type: str) -> bool:
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False

    # CPUs without AMX or AVX512-BF16 emulate bf16 up to 100 times slower than float32, and no public flag says so on
    # every platform. Products of 256 x 256 matrices (33 MFLOP) measure it in milliseconds.
    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(256, 256, dtype=dtype)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.float32) > 1.5 * seconds(torch.bfloat16)
