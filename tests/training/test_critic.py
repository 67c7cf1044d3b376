"""The adversarial loss: who gets which gradient, what is exported, and that a resume is exact."""

import json

import pytest
import torch
from safetensors.torch import load_file

from v2flow_cli.errors import RecipeError
from v2flow_cli.training.critic import Critic
from v2flow_cli.training.loop import train
from v2flow_cli.training.perceptual import load_features

from .conftest import quiet, recipe
from .test_objective import objective, terms
from .test_perceptual import ALONE, WHOLE, features, pictures  # noqa: F401


@pytest.fixture
def network(features):  # noqa: F811
    return load_features(features)


@pytest.fixture
def critic(network):
    torch.manual_seed(0)
    return Critic(network, width=8)


def test_the_losses_counted_by_hand(critic):
    class Mean(torch.nn.Module):
        def forward(self, block):
            return block.mean((1, 2, 3))

    critic.heads = torch.nn.ModuleList([Mean()])
    photos = [torch.tensor([0.5, -0.5]).reshape(2, 1, 1, 1)]  # scaled by their root mean square to 1 and -1
    drawn = [torch.tensor([0.25, -1.0]).reshape(2, 1, 1, 1)]  # 0.5 and -2
    out = critic.losses(drawn, photos)
    assert out.decoder.item() == pytest.approx(0.75)  # minus the mean score
    assert out.critic.item() == pytest.approx((0 + 2) / 2 + (1.5 + 0) / 2)


def test_each_side_gets_the_gradient_of_its_own_loss(network, critic):
    drawn, photos = pictures().requires_grad_(), pictures(seed=2)

    def blocks():
        return network.blocks(drawn), network.blocks(photos)

    critic.losses(*blocks()).decoder.backward()
    assert drawn.grad.abs().sum() > 0 and all(p.grad is None for p in critic.parameters())
    drawn.grad = None
    critic.losses(*blocks()).critic.backward()
    assert drawn.grad is None and all(p.grad is not None for p in critic.parameters())


def test_the_critic_learns_to_tell_noise_from_photos(network, critic):
    flat, noise = network.blocks(0.1 * pictures()), network.blocks(pictures())
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        critic.losses(flat, noise).critic.backward()
        optimizer.step()
    with torch.no_grad():
        out = critic.losses(flat, noise)
    assert out.critic < 1 and out.decoder > 0  # 2 before; the drawn pictures score below 0


def test_the_total_has_the_weight_of_the_recipe(world, tmp_path, features):  # noqa: F811
    settings = (*ALONE, *WHOLE, "loss.adversarial=0.5", f"loss.features={features}", "loss.pixel_share=0.5")
    made = objective(world, tmp_path, *settings)
    _, out = terms(made)
    assert out["loss"].item() == pytest.approx((0.5 * out["adversarial_loss"] + out["critic_loss"]).item(), rel=1e-4)
    out["loss"].backward()
    assert made.model.flow.regress.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in made.critic.parameters())


def test_a_training_resumes_exactly_and_exports_no_critic(world, tmp_path, features):  # noqa: F811
    first = tmp_path / "first"
    plain = train(recipe(world, "tokenizer", first, "train.steps=2", "flow.share=0.5"), resume=False, log=quiet)
    settings = (f"init_from={first}", "freeze_tokens=true", "train.log_every=1", "flow.share=0.5", "train.steps=4")
    settings += ("loss.adversarial=1.0", f"loss.features={features}", "loss.pixel_share=0.5")

    class Stopped(Exception):
        pass

    def stop(step):
        if step == 3:
            raise Stopped

    whole = train(recipe(world, "tokenizer", tmp_path / "whole", *settings), resume=False, log=quiet)
    parts = recipe(world, "tokenizer", tmp_path / "parts", *settings, "train.save_every=2")
    with pytest.raises(Stopped):
        train(parts, resume=False, log=quiet, at_step=stop)
    again = train(parts, resume=True, log=quiet)
    lines = [json.loads(line) for line in (again.folder / "metrics.jsonl").read_text().splitlines()]
    assert len({line["train/critic_loss"] for line in lines}) == 4
    one, two = (load_file(run.folder / "model.safetensors") for run in (whole, again))
    assert one.keys() == two.keys() == load_file(plain.folder / "model.safetensors").keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_it_needs_features(world, tmp_path):
    with pytest.raises(RecipeError, match=r"loss.features is empty; loss.adversarial needs a file"):
        recipe(world, "tokenizer", tmp_path, "loss.adversarial=1.0")
