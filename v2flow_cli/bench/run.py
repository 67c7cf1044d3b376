"""A whole bench at one image size: speed, then every system on every photo."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from v2flow_cli.bench import similarity
from v2flow_cli.bench.candidates import System, autoencoder_system, codec_system, coder_system
from v2flow_cli.bench.codebook_use import token_bytes
from v2flow_cli.bench.codec_speed import Speed, measure_speeds
from v2flow_cli.bench.codecs import available_codecs
from v2flow_cli.bench.coder import Coder, v2flow_coder
from v2flow_cli.bench.evaluate import Result, batches, evaluate
from v2flow_cli.bench.networks import MetricNetworks
from v2flow_cli.bench.sweep import Setting, settings_of_models
from v2flow_cli.errors import DataError
from v2flow_cli.runtime.digest import model_digest
from v2flow_cli.runtime.processes import Processes
from v2flow_cli.tokenizer import V2FlowTokenizer


@dataclass(frozen=True)
class Bench:
    """The result of a bench, and notes on what was left out and why."""

    result: Result
    notes: tuple[str, ...] = ()


def run_bench(
    models: Mapping[str, V2FlowTokenizer],
    photos: Iterable[tuple[str, Image.Image]],
    *,
    size: int | None = None,
    keep_aspect: bool = False,
    settings: Sequence[Setting] = (Setting(),),
    externals: Sequence[Coder] = (),
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    networks: MetricNetworks = MetricNetworks(),  # noqa: B008  frozen
    with_codecs: bool = True,
    codec_bytes: Sequence[int] = (),
    with_speed: bool = True,
    keep: int = 0,
    ranks: Processes = Processes(),  # noqa: B008  frozen
    tick: Callable[[int], None] = lambda advance: None,
) -> Bench:
    """Each model at each setting, external tokenizers, autoencoders, and codecs, on the same photos.

    Args:    photos, (name, RGB image) with distinct names, read one by one; size, side in pixels of a square (default:
             the first model's), or of one with the area of a picture that keeps its aspect; codec_bytes, budgets of
             the codecs besides those of the tokenizers; keep, images for the report; ranks, which share the photos,
             and of which the first measures speed.
    Raises:  DataError for a size or number of tokens that does not fit, or if there is no photo.
    """
    size = size or next((tokenizer.config.image_size for tokenizer in models.values()), 256)
    if size < similarity.SSIM_WINDOW:
        raise DataError(f"--res {size}: SSIM needs at least {similarity.SSIM_WINDOW} pixels a side.")
    coders = [v2flow_coder(name, models[name], s, dtype) for name, s in settings_of_models(models, size, settings)]
    coders += externals
    multiple = None
    if keep_aspect:
        multiple = math.lcm(*(tokenizer.size_multiple for tokenizer in models.values())) if models else 16
        if any(coder.length is not None and not models[coder.model].flexible for coder in coders):
            raise DataError(
                "--aspect keep: the shape of a picture determines its number of tokens, so leave tokens out."
            )
    duplicates = [name for name, count in Counter(coder.name for coder in coders).items() if count > 1]
    if duplicates:
        raise DataError(f"{duplicates[0]}: two tokenizers with this name. Rename one of them.")
    stream = iter(photos)
    first = list(itertools.islice(stream, batch_size))
    speeds: Mapping[str, Speed] = {}
    budgets = set(codec_bytes)
    if first:
        # One full batch, with repeated photos if they are fewer, before other work fills the memory.
        cycle = itertools.islice(itertools.cycle(first), batch_size)
        [[(_, batch)]] = batches(cycle, size, batch_size, seed)  # squares
        # One rank measures while the others wait, because they share the machine.
        speeds = measure_speeds(coders, batch.images, dtype=dtype) if with_speed and ranks.rank == 0 else {}
        ranks.wait()
        lengths = {coder.name: batch.token_ids(coder).shape[1] for coder in coders}
        budgets |= {token_bytes(lengths[coder.name], coder.codebook_size) for coder in coders}
    systems = [coder_system(coder) for coder in coders] + _autoencoders(models, dtype)
    notes = list(networks.notes)
    if with_codecs:
        codecs, missing = available_codecs()
        for codec, budget in itertools.product(codecs, sorted(budgets)):
            name = codec.name if len(budgets) == 1 else f"{codec.name}, {budget:,} bytes"
            systems.append(codec_system(name, codec, budget))
        notes += missing
    if keep_aspect and with_codecs:
        notes.append("The codecs get the bytes of a square picture's tokens, for every shape.")
    if size < similarity.MS_SSIM_MIN_SIZE:
        notes.append(f"MS-SSIM is left out: its five scales need {similarity.MS_SSIM_MIN_SIZE} pixels a side.")
    result = evaluate(
        itertools.chain(first, stream),
        systems,
        size=size,
        batch_size=batch_size,
        multiple=multiple,
        seed=seed,
        networks=networks,
        speeds=speeds,
        keep=keep,
        ranks=ranks,
        tick=tick,
    )
    return Bench(result, tuple(notes))


def _autoencoders(models: Mapping[str, V2FlowTokenizer], dtype: torch.dtype) -> list[System]:
    """One system for each different autoencoder; models with equal weights share it."""
    different: dict[str, str] = {}
    for name, tokenizer in models.items():
        different.setdefault(model_digest("", tokenizer.latents.state_dict()), name)
    if len(different) == 1:
        [name] = different.values()
        return [autoencoder_system("autoencoder alone", models[name], dtype=dtype)]
    return [autoencoder_system(f"autoencoder of {name}", models[name], dtype=dtype) for name in different.values()]
