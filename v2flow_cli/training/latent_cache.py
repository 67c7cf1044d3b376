"""Latents of fixed crops, computed once: the autoencoder then has no part in the training steps.

The first crops of the ordinary stream are kept, ``crops`` a photo; from then on these are all there is, in another
order each time round. Batch b is the same whenever a run resumes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from v2flow_cli.errors import ModelError, V2FlowError
from v2flow_cli.recipe.schema import TokenizerRecipe
from v2flow_cli.runtime.device import tf32
from v2flow_cli.runtime.digest import model_digest
from v2flow_cli.runtime.processes import raise_everywhere
from v2flow_cli.store.failures import Failure
from v2flow_cli.store.files import write_bytes
from v2flow_cli.tokenizer.latents import Latents
from v2flow_cli.training.crops import CropBatch, crop_loader

FORMAT = 1
IN_MEMORY = ("memory", "device")


@dataclass(frozen=True)
class LatentBatch:
    """``latents`` (B, C, h, w), scaled, and the ``keys`` of the photos they come from; else as ``CropBatch``."""

    latents: Tensor
    keys: list[str]
    failures: list[Failure]
    total: int

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """What the objective takes."""
        return {"latents": self.latents.to(device, torch.float32, non_blocking=True)}


class LatentCache:
    """Latents (N, C, h, w) in float16 and their keys: an indexable tensor in memory, or a slice of a file.

    failures: bad photos met while it was made, told with the first batch; total: photos in the set.
    """

    def __init__(self, latents: Any, keys: list[str], failures: Sequence[Failure] = (), total: int = 0) -> None:
        self.latents, self.keys, self.failures, self.total = latents, keys, list(failures), total

    def batches(self, batch_size: int, *, seed: int, start: int) -> Iterator[LatentBatch]:
        """Endless batches from batch ``start`` on; each time round is a permutation of its own."""
        total, around, order = len(self.keys), -1, np.empty(0, int)
        ordinal = start * batch_size
        while True:
            rows = []
            for place in range(ordinal, ordinal + batch_size):
                if place // total != around:
                    around = place // total
                    order = np.random.default_rng([seed, around]).permutation(total)
                rows.append(int(order[place % total]))
            ordinal += batch_size
            latents, keys = torch.stack([self.latents[row] for row in rows]), [self.keys[row] for row in rows]
            yield LatentBatch(latents, keys, self.failures, self.total)
            self.failures = []


def cached_batches(
    accelerator: Accelerator,
    recipe: TokenizerRecipe,
    autoencoder: Latents,
    batch_size: int,
    start: int,
    log: Callable[[str], None],
) -> Iterator[LatentBatch]:
    """This rank's batches from batch ``start`` on. Raises: SharedError, on every rank, where one has no cache."""
    problem, rank, ranks = "", accelerator.process_index, accelerator.num_processes
    try:
        cache = open_cache(recipe, autoencoder, rank=rank, ranks=ranks, device=accelerator.device)
    except V2FlowError as error:
        problem = str(error)
    raise_everywhere(problem, accelerator.device)
    log(f"latents of {len(cache.keys):,} crops a rank are cached ({recipe.latents.cache})")
    return cache.batches(batch_size, seed=recipe.train.seed, start=start)


def open_cache(
    recipe: TokenizerRecipe, autoencoder: Latents, *, rank: int, ranks: int, device: torch.device
) -> LatentCache:
    """The cache that ``recipe.latents`` asks for: this rank's part, made now unless it lies on disk.

    Raises:  ModelError for a folder whose latents come from another autoencoder, crop, or set of photos.
    """
    place = recipe.latents.cache
    facts = cache_facts(recipe, autoencoder, rank, ranks)
    if place in IN_MEMORY:
        made = _compute(recipe, autoencoder, rank, ranks, device)
        made.latents = made.latents.to(device if place == "device" else "cpu")
        return made
    part = Path(place) / f"rank-{rank}-of-{ranks}"
    file, record = part.with_suffix(".safetensors"), part.with_suffix(".json")
    if not record.exists():
        made = _compute(recipe, autoencoder, rank, ranks, device)
        write_bytes(file, save({"latents": made.latents}))
        bad = [failure.as_json() for failure in made.failures]
        whole = {**facts, "photos": made.total, "failures": bad, "keys": made.keys}
        write_bytes(record, json.dumps(whole).encode())  # the last one: it makes the cache whole
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        _check(record, found, facts)
        latents = safe_open(file, framework="pt").get_slice("latents")
        failures = [Failure(f["shard"], f["reason"], f["key"], f["samples"]) for f in found["failures"]]
        return LatentCache(latents, found["keys"], failures, found["photos"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"{part}: the cached latents cannot be read ({error}). Delete them to make them anew."
        ) from None


def cache_facts(recipe: TokenizerRecipe, autoencoder: Latents, rank: int, ranks: int) -> dict[str, Any]:
    """All that determines the cached latents."""
    plumbing = ("workers", "error_budget")
    data = {k: v for k, v in dataclasses.asdict(recipe.data).items() if k not in plumbing}
    return {
        "format": FORMAT,
        "autoencoder": autoencoder_digest(autoencoder),
        **{name: list(value) if isinstance(value, tuple) else value for name, value in data.items()},
        "crops": recipe.latents.cache_crops,
        "seed": recipe.train.seed,
        "rank": rank,
        "ranks": ranks,
    }


def autoencoder_digest(autoencoder: Latents) -> str:
    """16 hex digits over an autoencoder's kind, scale and weights."""
    return model_digest(f"{autoencoder.kind} {autoencoder.scale!r} {autoencoder.shift!r}", autoencoder.state_dict())


def _check(record: Path, found: dict[str, Any], facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        if found.get(name) != value:
            raise ModelError(
                f"{record}: the cached latents were made with {name} {found.get(name)}, but the recipe has {value}. "
                "Give another latents.cache, or delete this one."
            )


@torch.no_grad()
@tf32(False)
def _compute(recipe: TokenizerRecipe, autoencoder: Latents, rank: int, ranks: int, device: torch.device) -> LatentCache:
    batch_size = recipe.train.batch_size // recipe.train.accumulate // ranks
    loader = crop_loader(recipe.data, batch_size, seed=recipe.train.seed, start=0, rank=rank, world_size=ranks)
    parts: list[Tensor] = []
    keys: list[str] = []
    failures: dict[Failure, None] = {}
    for batch in loader:
        if not isinstance(batch, CropBatch):
            raise batch  # what stopped the stream
        parts.append(autoencoder.encode(batch.images.to(device)).half().cpu())
        keys.extend(batch.keys)
        failures.update(dict.fromkeys(batch.failures))
        wanted = max(1, batch.total // ranks) * recipe.latents.cache_crops
        if len(keys) >= wanted:
            break
    return LatentCache(torch.cat(parts)[:wanted].contiguous(), keys[:wanted], list(failures), batch.total)
