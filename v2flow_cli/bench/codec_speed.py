"""Speed: images per second of encode and decode, peak memory, and seconds to the first result of a command."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from v2flow_cli.bench.coder import Coder


@dataclass(frozen=True)
class Speed:
    """Median over repeats, after one warm-up batch; one process, batches of ``batch_size`` images."""

    encode_images_per_s: float
    decode_images_per_s: float
    peak_memory_bytes: int
    peak_memory_kind: str  # allocated on the GPU, or resident in the whole process so far
    image_size: int  # pixels
    batch_size: int
    repeats: int
    device: str
    dtype: str
    threads: int


def measure_speeds(
    coders: Sequence[Coder], images: Tensor, *, dtype: torch.dtype = torch.float32, repeats: int = 3
) -> dict[str, Speed]:
    """The speed of each coder by its name, on ``images`` (B, 3, S, S) in [-1, 1].

    Coders of one source encode once.
    """
    speeds: dict[str, Speed] = {}
    encoded: dict[str, tuple[Tensor, float]] = {}  # ids and seconds, by source
    for coder in coders:
        inputs, device = images.to(coder.device), coder.device
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        if coder.source not in encoded:
            seconds = _seconds(lambda: coder.encode(inputs), device, repeats)  # noqa: B023  called at once
            encoded[coder.source] = coder.encode(inputs), seconds
        ids, encode = encoded[coder.source]
        ids, seeds = ids[:, : coder.tokens].to(device), range(len(images))
        size = (images.shape[2], images.shape[3])
        decode = _seconds(lambda: coder.decode(ids, seeds, size), device, repeats)  # noqa: B023
        speeds[coder.name] = Speed(
            encode_images_per_s=len(images) / encode,
            decode_images_per_s=len(images) / decode,
            peak_memory_bytes=torch.cuda.max_memory_allocated(device) if cuda else peak_resident_bytes(),
            peak_memory_kind="allocated on the GPU" if cuda else "resident in the process",
            image_size=images.shape[-1],
            batch_size=len(images),
            repeats=repeats,
            device=torch.cuda.get_device_name(device) if cuda else str(device),
            dtype=str(dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
        )
    return speeds


def _seconds(step: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median wall time of ``step`` after one warm-up, in seconds."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def peak_resident_bytes() -> int:
    """Largest resident memory of this process since it began, in bytes."""
    import resource  # POSIX only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def help_seconds(commands: Sequence[str], repeats: int = 3) -> dict[str, float]:
    """Median seconds of ``v2flow --help`` (key "") and each ``v2flow COMMAND --help``, in new processes."""
    arguments = ["-m", "v2flow_cli.cli.app"]
    return {c: _process_seconds([*arguments, *c.split(), "--help"], repeats) for c in ("", *commands)}


def first_answer_seconds(commands: Sequence[str], repeats: int = 3) -> dict[str, float]:
    """Median seconds of `python -c "import torch"` (key "import torch"), and of one picture by each of ``commands``:
    encode, then decode and generate.

    Each is a new process, including the load of the embedded model. They run in turn, so that other work on the machine
    slows them alike.
    """
    with tempfile.TemporaryDirectory() as folder:
        photo, tokens = Path(folder, "photo.png"), Path(folder, "tokens")
        Image.effect_noise((256, 256), 60).convert("RGB").save(photo)
        arguments = {
            "encode": ["encode", str(photo), "-o", str(tokens), "--force"],
            "decode": ["decode", str(tokens), "-o", str(Path(folder, "decoded")), "--force"],
            "generate": ["generate", "a red fox", "-o", str(Path(folder, "generated")), "--force"],
        }
        calls = {"import torch": ["-c", "import torch"]}
        calls |= {command: ["-m", "v2flow_cli", *arguments[command]] for command in commands}
        turns = [{name: _process_seconds(call, 1) for name, call in calls.items()} for _ in range(repeats)]
        return {name: statistics.median(turn[name] for turn in turns) for name in calls}


def _process_seconds(arguments: Sequence[str], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
