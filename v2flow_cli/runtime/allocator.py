"""The C library's memory allocator in a training on a CPU."""

from __future__ import annotations

import ctypes
import os

import torch

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of glibc's mallopt, from malloc.h


def keep_freed_memory(device: torch.device) -> bool:
    """Let glibc reuse the memory of freed tensors in a training on a CPU; True if it does so from now on.

    By default glibc maps each large tensor anew, and the system fills its pages with zeros at the first access. A
    training step frees and allocates the same sizes again and again; with the memory kept it takes less time and up to
    a fifth more memory. Where the environment sets this (``MALLOC_MMAP_...``, ``MALLOC_TRIM_...``), and with other C
    libraries and devices, nothing changes.
    """
    if device.type != "cpu" or any(name.startswith(("MALLOC_MMAP", "MALLOC_TRIM")) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    # Both return 1 for success. The threshold is an int in C.
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
