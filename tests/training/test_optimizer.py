"""Muon: its parameters, the length of its steps, and an exact resume."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from v2flow_cli.training.checkpoint import Interrupted
from v2flow_cli.training.loop import build_objective, train
from v2flow_cli.training.muon import ADAMW_RMS, Muon, copies_kept, orthogonalize
from v2flow_cli.training.optimizer import build_optimizer
from v2flow_cli.training.state import flatten_optimizer, restore_optimizer

from .conftest import quiet, recipe

MUON = "optimizer.kind=muon"


@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32)])
def test_orthogonal_means_that_singular_values_come_near_one(shape):
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    given = torch.linspace(0.02, 1, min(shape))  # fifty times apart
    result = orthogonalize(left * given @ right)
    values = torch.linalg.svdvals(result)
    assert 0.5 < values.min() and values.max() < 1.3
    # directions stay: in the basis of the given matrix the result is nearly diagonal
    inside = left.T @ result @ right.T
    assert (inside - inside.diag().diag()).abs().max() < 1e-3


def test_a_stack_of_matrices_is_made_orthogonal_one_by_one():
    torch.manual_seed(0)
    stack = torch.randn(3, 16, 40) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    one_by_one = torch.stack([orthogonalize(matrix) for matrix in stack])
    torch.testing.assert_close(orthogonalize(stack), one_by_one)


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (24, 8, 3, 3)])
def test_a_step_is_as_long_as_one_of_adamw_and_moves_all_directions(shape):
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.zeros(shape))
    optimizer = Muon([{"params": [matrix], "orthogonal": True}], lr=0.01, weight_decay=0.0)
    low_rank = torch.randn(shape[0], 2) @ torch.randn(2, matrix.numel() // shape[0])
    noise = 0.05 * torch.randn_like(low_rank)
    matrix.grad = (low_rank + noise).view(shape)
    given = matrix.grad
    optimizer.step()
    assert matrix.grad is given, "the gradient is still there to look at"
    moved = matrix.detach().flatten(1)
    assert moved.square().mean().sqrt() == pytest.approx(0.01 * ADAMW_RMS, rel=0.25)
    values = torch.linalg.svdvals(moved)
    before = torch.linalg.svdvals(given.flatten(1))
    assert values.max() / values.median() < 2 < 5 < before.max() / before.median()


def test_matrices_go_to_muon_and_the_rest_to_adamw(world, tmp_path):
    objective = build_objective(recipe(world, "tokenizer", tmp_path / "t", MUON))
    optimizer, names = build_optimizer(objective, objective.recipe.optimizer)
    assert isinstance(optimizer, Muon)
    matrices, grouped, plain = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert "model.context.encoder.0.query.weight" in matrices and "model.resampler.stem.weight" in matrices
    assert all("conv2" in name for name in grouped), "kernels of grouped convolutions are no matrices"
    assert not any(name.startswith("model.flow.") for name in matrices + grouped)
    assert "model.context.mask_token" in plain and "model.context.norm_out.weight" in plain
    trained = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert sorted(matrices + grouped + plain) == sorted(trained)
    for group in optimizer.param_groups:  # what `train --dry-run` counts on
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            kept = [value for key, value in optimizer.state[parameter].items() if key != "step"]
            assert sum(value.numel() for value in kept) == copies_kept(optimizer, group) * parameter.numel()


def test_resuming_with_muon_equals_not_stopping(world, tmp_path):
    whole = train(recipe(world, "tokenizer", tmp_path / "whole", "train.steps=4", MUON), resume=False, log=quiet)
    made = recipe(world, "tokenizer", tmp_path / "parts", "train.steps=4", "train.save_every=1", MUON)

    def stop_after_two(message):
        if message.startswith("step 2"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(made, resume=False, log=stop_after_two)
    parts = train(made, resume=True, log=quiet)
    one, two = (load_file(run.folder / "model.safetensors") for run in (whole, parts))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    other = train(recipe(world, "tokenizer", tmp_path / "adamw", "train.steps=4"), resume=False, log=quiet)
    three = load_file(other.folder / "model.safetensors")
    assert not torch.equal(one["context.embed_patch.weight"], three["context.embed_patch.weight"])


def test_matrices_of_one_shape_move_in_one_stack_as_they_would_alone():
    """Bit for bit: linear layers, transposed ones, kernels and stacks of experts, over three steps."""
    torch.manual_seed(0)
    shapes = [(24, 24)] * 3 + [(16, 48)] * 2 + [(48, 16)] * 2 + [(8, 4, 3, 3)] * 2 + [(3, 8, 16)] * 2 + [(5, 7)]
    start = [torch.randn(shape) for shape in shapes]
    together, alone = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    settings = dict(lr=0.01, weight_decay=0.1)
    stacked = Muon([{"params": together, "orthogonal": True}], **settings)
    singles = [Muon([{"params": [parameter], "orthogonal": True}], **settings) for parameter in alone]
    for _ in range(3):
        for parameter, other in zip(together, alone):
            parameter.grad = torch.randn(parameter.shape)
            other.grad = parameter.grad.clone()
        stacked.step()
        for optimizer in singles:
            optimizer.step()
    for parameter, other in zip(together, alone):
        assert torch.equal(parameter, other)
        assert parameter.grad is not None


def test_a_state_of_fused_adamw_is_restored_where_it_counts():
    """Its steps lie on the weights' device; 2 steps, saved and restored, and 1 more equal 3."""

    def made(fused):
        torch.manual_seed(0)
        layer = nn.Linear(4, 4)
        groups = [{"params": [layer.weight], "orthogonal": True}, {"params": [layer.bias]}]
        return layer, Muon(groups, lr=0.1, fused=fused), {id(p): n for n, p in layer.named_parameters()}

    def step(layer, optimizer):
        layer(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for fused in (False, True):
        layer, optimizer, names = made(fused)
        other, restored, other_names = made(fused)
        for _ in range(2):
            step(layer, optimizer)
        other.load_state_dict(layer.state_dict())
        restore_optimizer(restored, other_names, flatten_optimizer(optimizer, names))
        for pair in ((layer, optimizer), (other, restored)):
            step(*pair)
        assert torch.equal(layer.weight, other.weight) and torch.equal(layer.bias, other.bias)
