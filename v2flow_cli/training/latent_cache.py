"""Latents of fixed crops, computed once, so that training steps do not run the autoencoder.

The first crops of the normal stream are stored, ``cache_crops`` per photo; training uses only these, in another order
in each epoch. Batch b does not depend on resumes.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from v2flow_cli.errors import ModelError, foreign_errors
from v2flow_cli.recipe.schema import TokenizerRecipe
from v2flow_cli.runtime.device import tf32
from v2flow_cli.runtime.digest import model_digest
from v2flow_cli.runtime.processes import on_every_rank
from v2flow_cli.store.failures import Failure
from v2flow_cli.store.files import write_bytes
from v2flow_cli.tokenizer.latents import Latents
from v2flow_cli.tokenizer.preprocess import from_uint8
from v2flow_cli.tokenizer.v2flow import V2FlowTokenizer
from v2flow_cli.training.crops import first_crops, shuffled_rows

FORMAT = 2
IN_MEMORY = ("memory", "device")
LOG_SECONDS = 10.0


@dataclass(frozen=True)
class LatentBatch:
    """``latents`` (B, C, h, w), scaled, and the ``keys`` of their photos; else as ``CropBatch``.

    pixels: (B, S, S, 3), 8-bit, for the losses in pixels; token_ids: of frozen tokens, (B, n) for each rate of the
    resampler. Either may be missing.
    """

    latents: Tensor
    keys: list[str]
    failures: list[Failure]
    total: int
    pixels: Tensor | None = None
    token_ids: tuple[Tensor, ...] = ()

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """Inputs of the objective."""
        inputs: dict[str, Any] = {"latents": self.latents.to(device, torch.float32, non_blocking=True)}
        if self.pixels is not None:
            inputs["images"] = from_uint8(self.pixels.to(device, non_blocking=True))
        if self.token_ids:
            inputs["token_ids"] = tuple(ids.to(device, torch.int64, non_blocking=True) for ids in self.token_ids)
        return inputs


class LatentCache:
    """Latents (N, C, h, w) in float16 and their keys: an indexable tensor in memory, or a slice of a file.

    failures: bad photos, reported with the first batch; total: photos in the set; pixels and token_ids, as in
    ``LatentBatch``, stored in the same way.
    """

    def __init__(
        self,
        latents: Any,
        keys: list[str],
        failures: Sequence[Failure] = (),
        total: int = 0,
        pixels: Any = None,
        token_ids: Sequence[Any] = (),
    ) -> None:
        self.latents, self.keys, self.failures, self.total = latents, keys, list(failures), total
        self.pixels, self.token_ids = pixels, tuple(token_ids)

    def batches(self, batch_size: int, *, seed: int, start: int) -> Iterator[LatentBatch]:
        """Endless batches from batch ``start`` on; each epoch is another permutation."""
        for rows in shuffled_rows(len(self.keys), batch_size, seed=seed, start=start):
            yield LatentBatch(
                _rows(self.latents, rows),
                [self.keys[row] for row in rows],
                self.failures,
                self.total,
                None if self.pixels is None else _rows(self.pixels, rows),
                tuple(_rows(ids, rows) for ids in self.token_ids),
            )
            self.failures = []

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for a file."""
        named = {"latents": self.latents} | ({} if self.pixels is None else {"pixels": self.pixels})
        return named | {f"token_ids.{rate}": ids for rate, ids in enumerate(self.token_ids)}


def _rows(array: Any, rows: np.ndarray) -> Tensor:
    """``array[rows]`` of a tensor, or of a safetensors slice, which is read row by row."""
    if isinstance(array, Tensor):
        return array.index_select(0, torch.from_numpy(rows).to(array.device, non_blocking=True))
    return torch.stack([array[int(row)] for row in rows])


def cached_batches(
    accelerator: Accelerator,
    recipe: TokenizerRecipe,
    model: V2FlowTokenizer,
    batch_size: int,
    start: int,
    log: Callable[[str], None],
) -> Iterator[LatentBatch]:
    """This rank's batches from batch ``start`` on. Raises: SharedError, on every rank, if one has no cache."""
    where: dict[str, Any] = dict(rank=accelerator.process_index, ranks=accelerator.num_processes)
    device = accelerator.device
    cache = on_every_rank(lambda: open_cache(recipe, model, device=device, log=log, **where), device)
    log(f"latents of {len(cache.keys):,} crops a rank are cached ({recipe.latents.cache})")
    return cache.batches(batch_size, seed=recipe.train.seed, start=start)


def open_cache(
    recipe: TokenizerRecipe,
    model: V2FlowTokenizer,
    *,
    rank: int,
    ranks: int,
    device: torch.device,
    log: Callable[[str], None],
) -> LatentCache:
    """This rank's part of the cache of ``recipe.latents``, computed now unless it is on disk.

    Raises:  ModelError for a folder with latents of another autoencoder, crop, or set of photos.
    """
    target = recipe.latents.cache
    facts = cache_facts(recipe, model, rank, ranks)
    if target in IN_MEMORY:
        storage = device if target == "device" else torch.device("cpu")
        return _compute(recipe, model, rank, ranks, device, storage, log)
    part = Path(target) / f"rank-{rank}-of-{ranks}"
    file, record = part.with_suffix(".safetensors"), part.with_suffix(".json")
    if not record.exists():
        cache = _compute(recipe, model, rank, ranks, device, torch.device("cpu"), log)
        write_bytes(file, save(cache.tensors()))
        bad = [failure.as_json() for failure in cache.failures]
        content = {**facts, "photos": cache.total, "failures": bad, "keys": cache.keys}
        write_bytes(record, json.dumps(content).encode())  # last: it marks the cache as complete
    with foreign_errors(f"{part}: the cached latents cannot be read", "Delete them to compute them again."):
        content = json.loads(record.read_text(encoding="utf-8"))
        _check(record, content, facts)
        tensors = safe_open(file, framework="pt")
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}
        ids = [slices[name] for name in sorted(slices) if name.startswith("token_ids.")]
        failures = [Failure.from_json(failure) for failure in content["failures"]]
        return LatentCache(slices["latents"], content["keys"], failures, content["photos"], slices.get("pixels"), ids)


def cache_facts(recipe: TokenizerRecipe, model: V2FlowTokenizer, rank: int, ranks: int) -> dict[str, Any]:
    """Everything that determines the cached latents."""
    irrelevant = ("workers", "error_budget", "resident_px")
    data = {k: v for k, v in dataclasses.asdict(recipe.data).items() if k not in irrelevant}
    return {
        "format": FORMAT,
        "autoencoder": autoencoder_digest(model.latents),
        "pictures": recipe.loss.draws,
        "tokens": model.token_digest if recipe.freeze_tokens else "",
        **{name: list(value) if isinstance(value, tuple) else value for name, value in data.items()},
        "crops": recipe.latents.cache_crops,
        "seed": recipe.train.seed,
        "rank": rank,
        "ranks": ranks,
    }


def autoencoder_digest(autoencoder: Latents) -> str:
    """16 hex digits over an autoencoder's kind, scale and weights."""
    return model_digest(f"{autoencoder.kind} {autoencoder.scale!r} {autoencoder.shift!r}", autoencoder.state_dict())


def _check(record: Path, content: dict[str, Any], facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        if content.get(name) != value:
            raise ModelError(
                f"{record}: the cached latents were computed with {name} {content.get(name)}, but the recipe has "
                f"{value}. Use another latents.cache, or delete this one."
            )


@torch.no_grad()
@tf32(False)
def _compute(
    recipe: TokenizerRecipe,
    model: V2FlowTokenizer,
    rank: int,
    ranks: int,
    device: torch.device,
    storage: torch.device,
    log: Callable[[str], None],
) -> LatentCache:
    """The cache, computed on ``device`` and stored on ``storage``. Logs how far it is."""
    batch_size, per_photo = recipe.train.batch_size // recipe.train.accumulate // ranks, recipe.latents.cache_crops
    rates = range(len(model.resampler.lengths))
    latents: list[Tensor] = []
    pixels: list[Tensor] = []
    token_ids: list[list[Tensor]] = [[] for _ in rates]
    keys: list[str] = []
    failures: dict[Failure, None] = {}
    total = 0
    logged = time.monotonic()
    where: dict[str, Any] = dict(rank=rank, world_size=ranks, output=recipe.output)
    crops = first_crops(recipe.data, batch_size, seed=recipe.train.seed, per_photo=per_photo, **where)
    for batch in crops:
        scaled = model.latents.encode(batch.inputs(device)["images"])
        latents.append(scaled.half().contiguous().to(storage))
        if recipe.loss.draws:
            pixels.append(batch.pixels.to(storage))
        for rate in rates if recipe.freeze_tokens else ():
            token_ids[rate].append(model.ids_of_latents(scaled, rate).int().to(storage))
        keys.extend(batch.keys)
        failures.update(dict.fromkeys(batch.failures))
        total = batch.total
        if time.monotonic() - logged >= LOG_SECONDS:
            logged = time.monotonic()
            log(f"latents of {len(keys):,} of {total // ranks * per_photo:,} crops a rank are computed")
    joined = torch.cat(pixels) if pixels else None
    ids = [torch.cat(parts) for parts in token_ids if parts]
    return LatentCache(torch.cat(latents), keys, list(failures), total, joined, ids)
