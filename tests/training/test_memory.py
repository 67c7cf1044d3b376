"""The memory that `train --dry-run` states, compared with that of a pass."""

import dataclasses
import re
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from v2flow_cli.errors import RecipeError
from v2flow_cli.recipe import load_recipe
from v2flow_cli.recipe.schema import Quantizer, Vocabulary
from v2flow_cli.tokenizer.quantizer_ema import EMAQuantizer
from v2flow_cli.tokenizer.vocabulary import VocabularyProjection
from v2flow_cli.training.loop import train
from v2flow_cli.training.memory import LiveBytes, building_model, check_batch_fits
from v2flow_cli.training.plan import plan

from ..conftest import RECIPES
from .conftest import quiet, recipe

LLAMA_SIZED = (151_669, 4096)


def to_code(words, width, top_k, device="cpu", codes=16_384):
    """From 1,024 tokens to their codes and back: the part of a training pass that uses the vocabulary."""
    with torch.device(device):
        projection = VocabularyProjection(Vocabulary("x", "tied", 20.0, 1.0, 0.1, 0, top_k), 64, words, width)
        quantizer = EMAQuantizer(Quantizer(codes, 0, "cosine", 0.99, 0, 0.1, 0.0), width)
        tokens = torch.randn(1, 1024, 64, requires_grad=True)

    def run():
        out = quantizer(projection(tokens, noise_scale=0.1).embeddings, step=1)
        (out.embeddings.square().sum() + out.commit_loss).backward()

    return projection, run


def most_held(run) -> int:
    """Most bytes that torch's allocator held for ``run`` at a time; resident memory depends on the system too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in changes))


@pytest.mark.parametrize("top_k", [0, 16])
def test_a_pass_uses_the_stated_memory_without_all_logits(top_k, monkeypatch):
    monkeypatch.setattr("v2flow_cli.tokenizer.vocabulary.LOGITS_AT_ONCE", 2**20)
    monkeypatch.setattr("v2flow_cli.tokenizer.vocabulary.VOCAB_CHUNK", 2048)
    _, stated_run = to_code(6_000, 128, top_k, "meta", codes=256)
    with LiveBytes() as stated:
        stated_run()
    projection, run = to_code(6_000, 128, top_k, codes=256)
    projection.set_table(torch.randn(6_000, 128))
    taken = most_held(run)
    all_logits = 4 * 1024 * 6_000
    assert taken < 1.3 * all_logits  # a plain softmax has five of these at once
    assert taken == pytest.approx(stated.peak, rel=0.01)


@pytest.mark.parametrize("top_k", [0, 64])
def test_one_image_beside_the_largest_tables_is_stated_below_two_gigabytes(top_k):
    _, run = to_code(*LLAMA_SIZED, top_k, "meta")
    with LiveBytes() as stated:
        run()
    assert stated.peak < 2e9


@pytest.mark.slow
def test_one_image_beside_the_largest_tables_takes_less_than_two_gigabytes():
    if int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) < 8e6:
        pytest.skip("needs 8 GB of free memory")
    _, run = to_code(*LLAMA_SIZED, top_k=64)
    assert most_held(run) < 2e9


def test_the_dry_run_states_all_that_training_holds():
    stated = plan(load_recipe(RECIPES / "tiny" / "autoencoder.yaml"))
    parameters = 4 * stated["parameters"]
    assert stated["gradients_bytes"] == parameters and stated["optimizer_bytes"] == 3 * parameters
    parts = ("weights", "gradients", "optimizer", "one_image")
    assert stated["peak_with_one_image_bytes"] == sum(stated[f"{part}_bytes"] for part in parts)
    larger = plan(load_recipe(RECIPES / "tiny" / "autoencoder.yaml", ["data.crop_size=128"]))
    assert 3.5 < larger["one_image_bytes"] / stated["one_image_bytes"] < 4.5


def test_live_bytes_by_hand():
    with LiveBytes() as live:
        one = torch.empty(1000, device="meta")
        two = one + 1
        view = two.view(10, 100)
        one.add_(1)
        assert live.now == 8000
        del two
        assert live.now == 8000  # the view holds it
        del view
        assert (live.now, live.peak) == (4000, 8000)


def test_a_batch_that_cannot_be_read_into_memory_is_refused_before_and_by_the_run(world, tmp_path):
    tree = recipe(world, "autoencoder", tmp_path / "out", "train.batch_size=1000000000")
    message = r"train\.batch_size is 1,000,000,000: 1,000,000,000 crops of \d+ px at a time take [\d,]+ GiB"
    (missing,) = plan(tree, resume=False)["missing"]
    assert re.match(message, missing)
    with pytest.raises(RecipeError, match=message):
        train(tree, resume=False, log=quiet)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    loop = dataclasses.replace(tree.train, accumulate=250_000_000)  # 4 at a time
    check_batch_fits(loop, 3 * 64**2, "crops of 64 px")


def test_a_model_that_does_not_fit_into_the_memory_is_one_sentence(world, tmp_path):
    tree = recipe(world, "autoencoder", tmp_path / "out", "model.encoder_width=4194304")  # 288 TiB
    with pytest.raises(RecipeError, match=r"the model does not fit into the memory \(.*allocate.*\)\. Make its widths"):
        train(tree, resume=False, log=quiet)
    with pytest.raises(RuntimeError, match="of another kind"), building_model():
        raise RuntimeError("of another kind")
