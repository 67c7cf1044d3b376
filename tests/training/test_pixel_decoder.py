"""A tokenizer's own decoder from latents to pixels: how it starts, what it leaves as it was, where it is stored."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from v2flow_cli.errors import ModelError
from v2flow_cli.jobs.add_decoder import add_decoder
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.latents import Latents
from v2flow_cli.training.loop import train

from .conftest import quiet, recipe
from .test_objective import objective

PIXELS = ("pixel_decoder=true", "freeze_tokens=true", "loss.pixels=1.0", "train.steps=3")


@pytest.fixture(scope="module")
def first(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "model"
    train(recipe(world, "tokenizer", folder, "train.steps=2"), resume=False, log=quiet)
    return folder


@pytest.fixture(scope="module")
def trained(world, first, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "model"
    train(recipe(world, "tokenizer", folder, f"init_from={first}", *PIXELS), resume=False, log=quiet)
    return folder


def decoded(folder, **options):
    model = V2FlowTokenizer.from_pretrained(folder)
    return model.decode(torch.arange(2 * model.max_tokens).reshape(2, -1) % 8, seeds=[1, 2], **options)


def test_it_starts_as_the_autoencoders(world, first, tmp_path):
    for start in ((f"init_from={first}", *PIXELS), ("pixel_decoder=true",)):
        made = objective(world, tmp_path, *start).model
        latents = torch.randn(2, made.latents.channels, 8, 8)
        assert torch.equal(made.latents.draw(latents, made.pixel_decoder), made.latents.draw(latents))
        assert all(p.requires_grad for p in made.pixel_decoder.parameters())
        assert not any(p.requires_grad for p in made.latents.parameters())


def test_it_is_trained_and_the_autoencoder_and_the_ids_stay(first, trained):
    old, new = (load_file(folder / "model.safetensors") for folder in (first, trained))
    own = {name for name in new if name.startswith("pixel_decoder.")}
    assert own == set(new) - set(old)
    moved = [not torch.equal(new[n], old[n.replace("pixel_decoder", "latents.autoencoder.decoder")]) for n in own]
    assert all(moved)
    assert all(torch.equal(new[n], old[n]) for n in old if n.startswith(("latents.", "quantizer.", "resampler.")))
    digests = {V2FlowTokenizer.from_pretrained(folder).token_digest for folder in (first, trained)}
    assert len(digests) == 1
    assert not torch.equal(decoded(first), decoded(trained))


def test_as_a_second_decoder(first, trained, tmp_path):
    both = shutil.copytree(first, tmp_path / "both")
    add_decoder(both, trained)
    assert torch.equal(decoded(both), decoded(first))
    assert torch.equal(decoded(both, decoder="sharp"), decoded(trained))
    back = V2FlowTokenizer.from_pretrained(both, decoder="sharp").with_decoder("faithful")
    assert back.pixel_decoder is None
    config = json.loads((both / "config.json").read_text())
    del config["decoders"]["sharp"]["pixel_decoder"]  # as folders from before this key
    (both / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="unexpected weights of decoder sharp: pixel_decoder"):
        decoded(both, decoder="sharp")


def test_a_model_that_has_one_keeps_it(world, trained, tmp_path):
    again = objective(world, tmp_path, f"init_from={trained}", *PIXELS).model
    saved = load_file(trained / "model.safetensors")
    assert all(torch.equal(v, saved[f"pixel_decoder.{n}"].float()) for n, v in again.pixel_decoder.state_dict().items())
    with pytest.raises(ModelError, match="its weights do not fit the recipe; only one of them has pixel_decoder"):
        objective(world, tmp_path, f"init_from={trained}", "freeze_tokens=true")


def test_other_autoencoders_have_no_copy():
    with pytest.raises(ModelError, match=r"the autoencoder is pixels\. Use pixel_decoder: false"):
        Latents({"class": "pixels"}).copy_decoder()
