"""Identities of the path and the solvers, checked against closed forms."""

import pytest
import torch

from v2flow_cli.recipe.schema import Flow
from v2flow_cli.tokenizer.flow import ProbabilityPath, VelocityNetwork, flow_times, sample_times, solve

SOLVERS = ("euler", "heun", "dpm++", "ddim")


def test_path_ends_are_data_and_noise():
    data, noise = torch.randn(3, 5), torch.randn(3, 5)
    for formulation in ("rectified_flow", "ddim"):
        path = ProbabilityPath(formulation)
        assert torch.equal(path.point(data, noise, torch.tensor(0.0)), data)
        assert torch.allclose(path.point(data, noise, torch.tensor(1.0)), noise, atol=1e-6)


def test_velocity_is_noise_minus_data():
    data, noise, t = torch.randn(3, 5), torch.randn(3, 5), torch.tensor(0.3)
    path = ProbabilityPath("rectified_flow")
    assert torch.allclose(path.velocity(path.point(data, noise, t), data, t), noise - data, atol=1e-5)


def test_flow_loss_weight_turns_data_error_into_velocity_error():
    path, t = ProbabilityPath("rectified_flow"), torch.tensor([0.25, 0.8])
    data, wrong, z_t = torch.zeros(2), torch.tensor([0.1, 0.3]), torch.randn(2)
    direct = (path.velocity(z_t, wrong, t) - path.velocity(z_t, data, t)) ** 2
    assert torch.allclose(path.loss_weight(t) * (wrong - data) ** 2, direct)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_constant_velocity_integrates_exactly(solver, steps):
    data, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    found = solve(lambda z, t: data, noise, ProbabilityPath("rectified_flow"), steps, solver)
    assert torch.allclose(found, data, atol=1e-6)


def _gaussian_case(steps: int, solver: str) -> float:
    """Error of a solver where data ~ N(2, 0.5^2): the exact flow map of noise e is 2 + 0.5 e."""
    mean, std = 2.0, 0.5
    noise = torch.linspace(-2, 2, 9)[None, None]

    def posterior_mean(z, t):
        return mean + (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2) * (z - (1 - t) * mean)

    found = solve(posterior_mean, noise, ProbabilityPath("rectified_flow"), steps, solver)
    return (found - (mean + std * noise)).abs().max().item()


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_converge_to_the_exact_flow(solver):
    assert _gaussian_case(200, solver) < 0.02
    assert _gaussian_case(200, solver) < _gaussian_case(10, solver)


def test_higher_order_solvers_beat_euler_at_equal_steps():
    assert _gaussian_case(20, "heun") < 0.5 * _gaussian_case(20, "euler")
    assert _gaussian_case(20, "dpm++") < 0.5 * _gaussian_case(20, "euler")


def test_ddim_is_euler_on_the_straight_path():
    assert _gaussian_case(13, "ddim") == pytest.approx(_gaussian_case(13, "euler"), abs=1e-6)


def test_times_are_in_range_and_shift_moves_them_to_noise():
    torch.manual_seed(0)
    plain = sample_times(4000, 1.0, torch.device("cpu"))
    torch.manual_seed(0)
    shifted = sample_times(4000, 3.0, torch.device("cpu"))
    assert plain.min() > 0 and shifted.max() < 1
    assert torch.allclose(shifted, 3 * plain / (1 + 2 * plain))
    assert flow_times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_network_starts_as_the_regression_and_one_step_is_its_value():
    torch.manual_seed(0)
    network = VelocityNetwork(Flow("rectified_flow", 16, 2, 3.0, 1), context_size=8, patch_size=4)
    context, noise = torch.randn(2, 3, 8), torch.randn(2, 3, 4)
    condition = network.condition(context)
    found = solve(lambda z, t: network(z, torch.full((2,), t), condition), noise, network.path, 1, "euler")
    assert torch.allclose(found, network.regress(context))


def test_every_position_has_its_own_condition():
    torch.manual_seed(0)
    network = VelocityNetwork(Flow("rectified_flow", 16, 2, 3.0, 1), context_size=8, patch_size=4)
    torch.nn.init.normal_(network.out.weight)
    torch.nn.init.normal_(network.modulate_context.weight)
    context, z = torch.randn(1, 3, 8), torch.randn(1, 3, 4)
    before = network(z, torch.tensor([0.5]), network.condition(context))
    changed = context.clone()
    changed[:, 1] += 1
    after = network(z, torch.tensor([0.5]), network.condition(changed))
    same = torch.isclose(before, after).all(-1)[0]
    assert same.tolist() == [True, False, True]
