"""Cost of a recipe's tokenizer with random weights: FLOPs, images per second, share of the matmul peak, memory."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from v2flow_cli.bench.codec_speed import peak_resident_bytes
from v2flow_cli.errors import DataError
from v2flow_cli.recipe import TokenizerRecipe
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.latents import Latents
from v2flow_cli.training.objectives.tokenizer import build_config
from v2flow_cli.training.plan import named_models

PEAK_SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product is the peak


@dataclass(frozen=True)
class PartSpeed:
    """One part at one batch size; times are medians over ``repeats``."""

    part: str
    batch_size: int
    gflop_per_image: float  # products and convolutions, two operations a multiply-add
    seconds: float
    images_per_s: float
    peak_share: float  # of the matmul peak
    peak_memory_bytes: int  # resident in the process, or allocated on the GPU, including weights


@dataclass(frozen=True)
class RecipeSpeed:
    """The conditions of the measurement, and the figures of the tokenizer's parts, then those of the autoencoder."""

    image_size: int  # pixels
    tokens: int  # an image
    patches: int  # an image
    parameters: int  # of the tokenizer, without autoencoder, word table and codebook
    settings: dict[str, Any]  # of decode
    matmul_peak_gflop_per_s: float
    device: str
    dtype: str
    threads: int
    repeats: int
    parts: tuple[PartSpeed, ...]
    notes: tuple[str, ...]


def measure_recipe(
    recipe: TokenizerRecipe,
    *,
    batch_sizes: Sequence[int] = (1, 4, 16),
    size: int | None = None,
    repeats: int = 1,
    autoencoder: bool = False,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> RecipeSpeed:
    """Speed of ``recipe`` with random weights on images of ``size`` pixels (default: the recipe's).

    The tokenizer is timed on latents of the right shape; with ``autoencoder`` the autoencoder is timed too, separately
    and only at the first batch size. ``settings`` (num_mask_steps, solver, ...) go to ``decode``; None is the recipe's.

    Raises:  DataError for a size that does not fit.
    """
    size = size or recipe.image_size
    spec, shape, notes = named_models(recipe)
    if notes:
        raise DataError(
            f"{recipe.output}: the recipe names models whose shapes are unknown ({' '.join(notes)}) Run its "
            "earlier stages first, or name others with --set."
        )
    with torch.device("meta"):
        model = V2FlowTokenizer(build_config(recipe, spec, shape))
    try:
        tokens = model.num_tokens(size, size)
    except ValueError as error:
        raise DataError(f"--res {size}: {error}.") from None
    frozen, model.latents = model.latents, _NoiseLatents(model.latents)  # type: ignore[assignment]
    most = max(batch_sizes)
    images, ids = torch.zeros(most, 3, size, size), torch.randint(model.config.codebook_size, (most, tokens))

    def decode(batch: int, **changed: Any) -> Tensor:
        return model.decode(ids[:batch], height=size, width=size, seeds=list(range(batch)), **{**settings, **changed})

    def encode(batch: int) -> Tensor:
        return model.encode(images[:batch])

    flop = {"encode": count_flop(lambda: encode(1)), "decode": count_flop(lambda: decode(1))}
    model = randomise(model, device, dtype).eval()
    images = images.to(device, dtype)
    clock = _Clock(device, dtype, repeats)
    clock.measure("encode", flop["encode"], encode, batch_sizes, warm_up=lambda: encode(1))
    few = {"num_mask_steps": 1, "num_flow_steps": 1}  # reads all weights once
    clock.measure("decode", flop["decode"], decode, batch_sizes, warm_up=lambda: decode(1, **few))
    if autoencoder:
        notes = ["The autoencoder was timed with random weights."]
        _measure_autoencoder(frozen, images[: batch_sizes[0]], clock)
    else:
        notes = [
            f"Without the autoencoder ({recipe.latents.autoencoder}): the tokenizer was timed on latents of its shape."
        ]
    side = frozen.downsampling * model.patch_size
    defaults = {name: getattr(recipe.sampling, name) for name in settings if hasattr(recipe.sampling, name)}
    return RecipeSpeed(
        image_size=size,
        tokens=tokens,
        patches=(size // side) ** 2,
        parameters=sum(p.numel() for p in model.parameters()),
        settings={name: defaults.get(name) if value is None else value for name, value in settings.items()},
        matmul_peak_gflop_per_s=clock.peak / 1e9,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        repeats=repeats,
        parts=clock.parts(),
        notes=tuple(notes),
    )


def _measure_autoencoder(frozen: Latents, images: Tensor, clock: _Clock) -> None:
    encode_flop = count_flop(lambda: frozen.encode(images[:1].to("meta")))
    latents = frozen.encode(images.to("meta"))
    decode_flop = count_flop(lambda: frozen.decode(latents[:1]))
    frozen = randomise(frozen, images.device, images.dtype).eval()
    latents, batch = frozen.encode(images), [len(images)]
    clock.measure("autoencoder encode", encode_flop, lambda batch: frozen.encode(images), batch)
    clock.measure("autoencoder decode", decode_flop, lambda batch: frozen.decode(latents), batch)


def count_flop(step: Callable[[], Any]) -> int:
    """FLOPs of products and convolutions in ``step``, two per multiply-add; on the meta device nothing is computed."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        step()
    return counter.get_total_flops()


Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def randomise(module: Module, device: torch.device, dtype: torch.dtype) -> Module:
    """``module``, built on the meta device, with random weights on ``device``; counters are zero."""
    module = module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in module.parameters():
        bound = 1 / math.sqrt(max(1, parameter[0].numel() if parameter.ndim > 1 else parameter.numel()))
        parameter.uniform_(-bound, bound, generator=generator)
    for buffer in module.buffers():
        # Positive, because some are counts, variances and standard deviations.
        buffer.uniform_(0.5, 1.5, generator=generator) if buffer.is_floating_point() else buffer.zero_()
    return module.to(dtype)


class _NoiseLatents(nn.Module):
    """Replaces an autoencoder: the latents of every image are the same noise, and decoding returns them."""

    def __init__(self, latents: Latents) -> None:
        super().__init__()
        self.channels, self.downsampling = latents.channels, latents.downsampling

    def encode(self, images: Tensor) -> Tensor:
        batch, _, height, width = images.shape
        shape = (batch, self.channels, height // self.downsampling, width // self.downsampling)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(
            images
        )  # on the same device, with the same type

    def decode(self, latents: Tensor, pixel_decoder: nn.Module | None = None) -> Tensor:
        return latents


class _Clock:
    """Times passes, and the matmul peak, which is the fastest product between them."""

    def __init__(self, device: torch.device, dtype: torch.dtype, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        side = PEAK_SIDE.get(device.type, 2048)
        self.flop = 2 * side**3
        self.square = torch.randn(side, side, device=device, dtype=dtype)
        self.peak = 0.0  # FLOP a second
        self.rows: list[tuple[str, int, int, float, int]] = []

    def measure(
        self,
        part: str,
        flop: int,
        step: Callable[[int], Any],
        batch_sizes: Sequence[int],
        warm_up: Callable[[], Any] = lambda: None,
    ) -> None:
        """Time ``step`` of ``flop`` FLOPs an image at each batch size, the smallest first."""
        with torch.inference_mode():
            warm_up()
            for batch in sorted(batch_sizes):
                self._update_peak()
                self._reset_peak_memory()
                seconds = statistics.median(self._seconds(step, batch) for _ in range(self.repeats))
                self.rows.append((part, batch, flop, seconds, self._memory()))

    def parts(self) -> tuple[PartSpeed, ...]:
        """All timings, relative to the fastest product of the run."""
        return tuple(
            PartSpeed(part, batch, flop / 1e9, seconds, batch / seconds, flop * batch / seconds / self.peak, memory)
            for part, batch, flop, seconds, memory in self.rows
        )

    def _update_peak(self) -> None:
        for _ in range(8):
            self.peak = max(self.peak, self.flop / self._seconds(torch.matmul, self.square, self.square))

    def _seconds(self, step: Callable[..., Any], *args: Any) -> float:
        self._wait()
        start = time.perf_counter()
        step(*args)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _reset_peak_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size

    def _memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if sys.platform == "linux":
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        return peak_resident_bytes()
