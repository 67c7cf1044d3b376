"""Photos that stay on the device: crops after a resume, and their positions."""

import itertools
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from v2flow_cli.errors import V2FlowError
from v2flow_cli.training import resident
from v2flow_cli.training.loop import train
from v2flow_cli.training.resident import load_resident, random_crops

from .conftest import quiet, recipe

CPU = torch.device("cpu")


def test_crops_follow_their_random_numbers(world, tmp_path):
    """Each pixel stores its own row and column, so that a crop shows its position."""
    data = replace(recipe(world, "autoencoder", tmp_path).data, crop_size=32, min_scale=0.5, max_scale=1.0)
    place = torch.arange(64, dtype=torch.uint8)
    photo = torch.stack([place[:, None].expand(64, 64), place.expand(64, 64), torch.zeros(64, 64).byte()], -1)
    u = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.5, 0.0], [0.0, 0.5, 0.5, 0.0], [0.9, 0.9, 0.9, 0.1]])
    crops = random_crops(photo.expand(4, -1, -1, -1), data, u)
    assert crops.shape == (4, 32, 32, 3) and crops.dtype == torch.uint8
    assert torch.equal(crops[0], photo[:32, :32])  # half the side at the left and top edge
    assert torch.equal(crops[1], photo[16:48, 32:])  # at the right edge, half way down
    corners = torch.stack([crops[2][0, 0], crops[2][-1, -1]]).int()  # the whole photo, at half its size
    assert (corners - torch.tensor([[0, 0, 0], [63, 63, 0]])).abs().max() <= 1
    assert torch.equal(crops[3], photo[:32, :32].flip(1))
    plain = random_crops(photo.expand(4, -1, -1, -1), replace(data, horizontal_flip=False), u)
    assert torch.equal(plain[3], photo[:32, :32])


def test_every_photo_comes_once_an_epoch_and_batches_resume(world, tmp_path):
    data = recipe(world, "autoencoder", tmp_path, "data.resident_px=64", "data.workers=0").data
    photos = load_resident(data, seed=0, rank=0, ranks=1, device=CPU)
    count = len(list((world / "photos").iterdir()))
    assert photos.pixels.shape == (count, 64, 64, 3) and photos.pixels.dtype == torch.uint8
    batches = list(itertools.islice(photos.batches(data, 3, seed=1, rank=0, start=0), 2 * count))
    keys = [key for batch in batches for key in batch.keys]
    assert sorted(keys[:count]) == sorted(keys[count : 2 * count]) == sorted(photos.keys)
    later = next(photos.batches(data, 3, seed=1, rank=0, start=5))
    assert later.keys == batches[5].keys and torch.equal(later.pixels, batches[5].pixels)
    other = next(photos.batches(data, 3, seed=1, rank=1, start=5))
    assert not torch.equal(other.pixels, later.pixels)


def test_resuming_equals_not_stopping(world, tmp_path):
    class Stop(Exception):
        pass

    def stop_at_two(step):
        if step == 2:
            raise Stop

    more = ("data.resident_px=64", "data.workers=0", "train.steps=4", "train.grid_every=0", "train.save_every=1")
    whole = train(recipe(world, "autoencoder", tmp_path / "whole", *more), resume=False, log=quiet)
    made = recipe(world, "autoencoder", tmp_path / "parts", *more)
    with pytest.raises(Stop):
        train(made, resume=False, log=quiet, at_step=stop_at_two)
    parts = train(made, resume=True, log=quiet)
    one, two = (load_file(run.folder / "model.safetensors") for run in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_photos_that_do_not_fit_are_refused():
    with pytest.raises(V2FlowError, match=r"resident_px is 65536: 100,000,000 photos need .* GB, .* Lower it, or set"):
        resident._allocate(10**8, 2**16, CPU)


def test_nothing_frozen_is_computed_again(world, tmp_path, monkeypatch):
    """A decoder learns from cached latents, pixels and ids: neither autoencoder, resampler nor quantiser runs."""
    from v2flow_cli.tokenizer import V2FlowTokenizer
    from v2flow_cli.tokenizer.latents import Latents

    first = train(recipe(world, "tokenizer", tmp_path / "t", "train.steps=2"), resume=False, log=quiet).folder
    more = (f"init_from={first}", "freeze_tokens=true", "loss.ssim=1.0", "loss.pixels=0.5", "train.grid_every=0")
    losses = []
    for place in ("device", str(tmp_path / "cache"), str(tmp_path / "cache")):
        output = tmp_path / str(len(losses))
        cached = recipe(world, "tokenizer", output, *more, f"latents.cache={place}", "train.steps=2")
        losses.append(train(cached, resume=False, log=quiet).metrics["train/loss"])
        if len(losses) == 2:  # the folder is whole: from here on nothing frozen may run

            def refuse(*given, **named):
                raise AssertionError("a frozen part ran")

            monkeypatch.setattr(Latents, "encode", refuse)
            monkeypatch.setattr(V2FlowTokenizer, "embed", refuse)
    assert losses[0] == losses[1] == losses[2]
