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
from v2flow_cli.tokenizer.preprocess import from_uint8
from v2flow_cli.tokenizer.v2flow import V2FlowTokenizer
from v2flow_cli.training.crops import first_crops, shuffled_rows

FORMAT = 2
IN_MEMORY = ("memory", "device")


@dataclass(frozen=True)
class LatentBatch:
    """``latents`` (B, C, h, w), scaled, and the ``keys`` of the photos they come from; else as ``CropBatch``.

    pixels: (B, S, S, 3), 8-bit, for the losses of pictures; token_ids: of frozen tokens, (B, n) for each rate of the
    resampler. Either may be missing.
    """

    latents: Tensor
    keys: list[str]
    failures: list[Failure]
    total: int
    pixels: Tensor | None = None
    token_ids: tuple[Tensor, ...] = ()

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """What the objective takes."""
        inputs: dict[str, Any] = {"latents": self.latents.to(device, torch.float32, non_blocking=True)}
        if self.pixels is not None:
            inputs["images"] = from_uint8(self.pixels.to(device, non_blocking=True))
        if self.token_ids:
            inputs["token_ids"] = tuple(ids.to(device, torch.int64, non_blocking=True) for ids in self.token_ids)
        return inputs


class LatentCache:
    """Latents (N, C, h, w) in float16 and their keys: an indexable tensor in memory, or a slice of a file.

    failures: bad photos met while it was made, told with the first batch; total: photos in the set; pixels and
    token_ids, as in ``LatentBatch``, kept in the same way.
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
        """Endless batches from batch ``start`` on; each time round is a permutation of its own."""
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
        """All that is kept, by name; for a file."""
        named = {"latents": self.latents} | ({} if self.pixels is None else {"pixels": self.pixels})
        return named | {f"token_ids.{rate}": ids for rate, ids in enumerate(self.token_ids)}


def _rows(kept: Any, rows: np.ndarray) -> Tensor:
    """``kept[rows]`` of a tensor, or of a safetensors slice, which gives one row at a time."""
    if isinstance(kept, Tensor):
        return kept.index_select(0, torch.from_numpy(rows).to(kept.device, non_blocking=True))
    return torch.stack([kept[int(row)] for row in rows])


def cached_batches(
    accelerator: Accelerator,
    recipe: TokenizerRecipe,
    model: V2FlowTokenizer,
    batch_size: int,
    start: int,
    log: Callable[[str], None],
) -> Iterator[LatentBatch]:
    """This rank's batches from batch ``start`` on. Raises: SharedError, on every rank, where one has no cache."""
    problem, rank, ranks = "", accelerator.process_index, accelerator.num_processes
    try:
        cache = open_cache(recipe, model, rank=rank, ranks=ranks, device=accelerator.device)
    except V2FlowError as error:
        problem = str(error)
    raise_everywhere(problem, accelerator.device)
    log(f"latents of {len(cache.keys):,} crops a rank are cached ({recipe.latents.cache})")
    return cache.batches(batch_size, seed=recipe.train.seed, start=start)


def open_cache(
    recipe: TokenizerRecipe, model: V2FlowTokenizer, *, rank: int, ranks: int, device: torch.device
) -> LatentCache:
    """The cache that ``recipe.latents`` asks for: this rank's part, made now unless it lies on disk.

    Raises:  ModelError for a folder whose latents come from another autoencoder, crop, or set of photos.
    """
    place = recipe.latents.cache
    facts = cache_facts(recipe, model, rank, ranks)
    if place in IN_MEMORY:
        return _compute(recipe, model, rank, ranks, device, device if place == "device" else torch.device("cpu"))
    part = Path(place) / f"rank-{rank}-of-{ranks}"
    file, record = part.with_suffix(".safetensors"), part.with_suffix(".json")
    if not record.exists():
        made = _compute(recipe, model, rank, ranks, device, torch.device("cpu"))
        write_bytes(file, save(made.tensors()))
        bad = [failure.as_json() for failure in made.failures]
        whole = {**facts, "photos": made.total, "failures": bad, "keys": made.keys}
        write_bytes(record, json.dumps(whole).encode())  # the last one: it makes the cache whole
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        _check(record, found, facts)
        opened = safe_open(file, framework="pt")
        kept = {name: opened.get_slice(name) for name in opened.keys()}
        ids = [kept[name] for name in sorted(kept) if name.startswith("token_ids.")]
        failures = [Failure.from_json(failure) for failure in found["failures"]]
        return LatentCache(kept["latents"], found["keys"], failures, found["photos"], kept.get("pixels"), ids)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"{part}: the cached latents cannot be read ({error}). Delete them to make them anew."
        ) from None


def cache_facts(recipe: TokenizerRecipe, model: V2FlowTokenizer, rank: int, ranks: int) -> dict[str, Any]:
    """All that determines the cached latents."""
    plumbing = ("workers", "error_budget", "resident_px")
    data = {k: v for k, v in dataclasses.asdict(recipe.data).items() if k not in plumbing}
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


def _check(record: Path, found: dict[str, Any], facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        if found.get(name) != value:
            raise ModelError(
                f"{record}: the cached latents were made with {name} {found.get(name)}, but the recipe has {value}. "
                "Give another latents.cache, or delete this one."
            )


@torch.no_grad()
@tf32(False)
def _compute(
    recipe: TokenizerRecipe,
    model: V2FlowTokenizer,
    rank: int,
    ranks: int,
    device: torch.device,
    place: torch.device,
) -> LatentCache:
    """The cache, made on ``device`` and kept on ``place``."""
    batch_size, per_photo = recipe.train.batch_size // recipe.train.accumulate // ranks, recipe.latents.cache_crops
    rates = range(len(model.resampler.lengths))
    latents: list[Tensor] = []
    pixels: list[Tensor] = []
    token_ids: list[list[Tensor]] = [[] for _ in rates]
    keys: list[str] = []
    failures: dict[Failure, None] = {}
    total = 0
    where: dict[str, Any] = dict(rank=rank, world_size=ranks, output=recipe.output)
    crops = first_crops(recipe.data, batch_size, seed=recipe.train.seed, per_photo=per_photo, **where)
    for batch in crops:
        found = model.latents.encode(batch.inputs(device)["images"])
        latents.append(found.half().contiguous().to(place))
        if recipe.loss.draws:
            pixels.append(batch.pixels.to(place))
        for rate in rates if recipe.freeze_tokens else ():
            token_ids[rate].append(model.ids_of_latents(found, rate).int().to(place))
        keys.extend(batch.keys)
        failures.update(dict.fromkeys(batch.failures))
        total = batch.total
    joined = torch.cat(pixels) if pixels else None
    ids = [torch.cat(parts) for parts in token_ids if parts]
    return LatentCache(torch.cat(latents), keys, list(failures), total, joined, ids)
