"""Cached latents: the same as computed ones, in an order that resumes, and refused when they are stale."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from v2flow_cli.errors import ModelError, RecipeError
from v2flow_cli.tokenizer.latents import Latents
from v2flow_cli.training import latent_cache
from v2flow_cli.training.crops import CropBatches
from v2flow_cli.training.latent_cache import LatentCache, open_cache
from v2flow_cli.training.loop import build_objective, train

from .conftest import quiet, recipe


def cached(world, output, place, *more):
    return recipe(world, "tokenizer", output, f"latents.cache={place}", *more)


def opened(made, log=quiet):
    objective = build_objective(made)
    return open_cache(made, objective.model, rank=0, ranks=1, device=torch.device("cpu"), log=log), objective


def test_each_epoch_has_another_order_and_batches_resume():
    cache = LatentCache(torch.arange(7.0).half()[:, None, None, None], list("abcdefg"))
    batches = list(itertools.islice(cache.batches(3, seed=5, start=0), 14))
    order = "".join(key for batch in batches for key in batch.keys)
    rounds = [order[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(one) == list("abcdefg") for one in rounds) and len({*rounds}) > 3
    assert all(chr(ord("a") + int(v)) == k for b in batches for v, k in zip(b.latents.flatten(), b.keys))
    later = next(cache.batches(3, seed=5, start=9))
    assert later.keys == batches[9].keys and torch.equal(later.latents, batches[9].latents)


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_the_cache_has_the_latents_of_the_first_crops(world, tmp_path, place):
    made = cached(world, tmp_path / "t", tmp_path / place if place == "folder" else place, "latents.cache_crops=2")
    cache, objective = opened(made)
    photos = len(list((world / "photos").iterdir()))
    assert len(cache.keys) == 2 * photos and sorted(cache.keys[:photos]) == sorted(cache.keys[photos:])
    crops = next(iter(CropBatches(made.data, 4, seed=0)))
    expected = objective.model.latents.encode(crops.images)
    kept = torch.stack([cache.latents[row] for row in range(4)]).float()
    assert crops.keys == cache.keys[:4] and torch.allclose(kept, expected, atol=2e-3, rtol=2e-3)


def test_the_log_says_how_many_latents_are_computed(world, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "LOG_SECONDS", 0.0)
    lines: list[str] = []
    cache, _ = opened(cached(world, tmp_path / "t", tmp_path / "cache", "latents.cache_crops=3"), lines.append)
    total = len(cache.keys)
    assert lines[0] == f"latents of 4 of {total} crops a rank are computed"
    assert lines[-1] == f"latents of {total} of {total} crops a rank are computed"
    opened(cached(world, tmp_path / "t", tmp_path / "cache", "latents.cache_crops=3"), lines.append)
    assert len(lines) == -(-total // 4)  # the second time they are read


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_resuming_from_cached_latents_equals_not_stopping(world, tmp_path, place):
    at = tmp_path / "cache" if place == "folder" else "device"
    whole = train(cached(world, tmp_path / "whole", at, "train.steps=4"), resume=False, log=quiet)

    class Stop(Exception):
        pass

    def stop_after_two(message):
        if message.startswith("step 2"):
            raise Stop

    parts = cached(world, tmp_path / "parts", at, "train.steps=4", "train.save_every=1")
    with pytest.raises(Stop):
        train(parts, resume=False, log=stop_after_two)
    done = train(parts, resume=True, log=quiet)
    one, two = (load_file(run.folder / "model.safetensors") for run in (whole, done))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_autoencoder_is_not_run_with_a_cache(world, tmp_path, monkeypatch):
    made = cached(world, tmp_path / "first", tmp_path / "cache", "train.steps=2")
    train(made, resume=False, log=quiet)

    def encode(self, images):
        raise AssertionError("the autoencoder ran")

    monkeypatch.setattr(Latents, "encode", encode)
    # no grid: its pictures are made from pixels
    more = ("train.steps=2", "train.grid_every=0")
    train(cached(world, tmp_path / "second", tmp_path / "cache", *more), resume=False, log=quiet)


@pytest.mark.parametrize(
    "change,named",
    [
        ("data.crop_size=32", "crop_size 64, but the recipe has 32"),
        ("data.min_scale=0.9", "min_scale 0.5"),
        ("latents.cache_crops=3", "crops 1, but the recipe has 3"),
        ("train.seed=1", "seed 0"),
    ],
)
def test_stale_latents_are_refused(world, tmp_path, change, named):
    opened(cached(world, tmp_path / "t", tmp_path / "cache"))
    with pytest.raises(ModelError, match=f"were computed with {named}"):
        opened(cached(world, tmp_path / "t", tmp_path / "cache", change))


def test_latents_of_another_autoencoder_and_damaged_ones_are_refused(world, tmp_path):
    made = cached(world, tmp_path / "t", tmp_path / "cache")
    _, objective = opened(made)
    objective.model.latents.autoencoder.encoder[1].weight.data += 1
    with pytest.raises(ModelError, match="were computed with autoencoder"):
        open_cache(made, objective.model, rank=0, ranks=1, device=torch.device("cpu"), log=quiet)
    (tmp_path / "cache" / "rank-0-of-1.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ModelError, match="cached latents cannot be read"):
        opened(made)
    assert json.loads((tmp_path / "cache" / "rank-0-of-1.json").read_text())["format"] == 2


def test_a_cache_without_crops_is_an_error(world, tmp_path):
    with pytest.raises(RecipeError, match=r"latents\.cache_crops is 0"):
        cached(world, tmp_path, "memory", "latents.cache_crops=0")
