"""Guidance by hand: a network with known predictions."""

import dataclasses

import pytest
import torch

from v2flow_cli.recipe.schema import Sampling
from v2flow_cli.tokenizer.flow import Condition, ProbabilityPath, solve
from v2flow_cli.tokenizer.guidance import Guided

PLAIN = Sampling(1, 2, "euler", 3.0, "constant", 1.0, "cfg", apg_momentum=0.0, apg_threshold=0.0, apg_parallel=1.0)


def guided(given, dummy, **changes):
    condition = [Condition(torch.tensor([x]), torch.zeros(1)) for x in (given, dummy)]
    settings = dataclasses.replace(PLAIN, **changes)
    return Guided(lambda z, t, c: c.data_mean, *condition, settings)


def ask(made, t=0.5, size=2):
    return made(torch.zeros(1, 1, size), t)[0, 0].tolist()


def test_plain_guidance_is_equation_7():
    assert ask(guided([[2.0, 1.0]], [[1.0, 3.0]])) == [3 * 2 - 2 * 1, 3 * 1 - 2 * 3]


def test_apg_that_limits_nothing_is_plain_guidance():
    pair = [[2.0, 1.0]], [[1.0, 3.0]]
    assert ask(guided(*pair, guidance="apg")) == pytest.approx(ask(guided(*pair)))


def test_apg_drops_the_component_parallel_to_the_prediction():
    # The push (1, 1) from D lies along the prediction (3, 0) by (1, 0); (0, 1) is left of it.
    assert ask(guided([[3.0, 0.0]], [[2.0, -1.0]], guidance="apg", apg_parallel=0.0)) == [3.0, 2.0]
    assert ask(guided([[3.0, 0.0]], [[2.0, -1.0]], guidance="apg", apg_parallel=0.5)) == [4.0, 2.0]


def test_apg_limits_the_size_of_the_guidance():
    # The push (0, 4) has the root mean square 4 / sqrt(2); a limit of half of it leaves (0, 2).
    limit = 2 / 2**0.5
    assert ask(guided([[0.0, 4.0]], [[0.0, 0.0]], guidance="apg", apg_threshold=limit)) == pytest.approx([0.0, 8.0])
    assert ask(guided([[0.0, 4.0]], [[0.0, 0.0]], guidance="apg", apg_threshold=99.0)) == pytest.approx([0.0, 12.0])


def test_apg_adds_the_guidance_of_earlier_steps():
    made = guided([[2.0, 0.0]], [[1.0, 0.0]], guidance="apg", apg_momentum=-0.5)
    # Pushes are 1, then 1 - 0.5 x 1, then 1 - 0.5 x 0.5, each twice (w - 1) on top of the prediction.
    assert [ask(made)[0] for _ in range(3)] == [4.0, 3.0, 3.5]


@pytest.mark.parametrize("guidance", ["cfg", "apg"])
def test_a_scale_of_one_is_no_guidance(guidance):
    settings = {"guidance": guidance, "guidance_scale": 1.0, "apg_parallel": 0.0, "apg_threshold": 0.1}
    assert ask(guided([[2.0, 1.0]], [[1.0, 3.0]], **settings)) == [2.0, 1.0]


def test_linear_guidance_starts_at_one():
    made = guided([[2.0]], [[1.0]], guidance_schedule="linear")
    assert [ask(made, t, 1)[0] for t in (1.0, 0.5, 0.0)] == [2.0, 3.0, 4.0]


def test_guidance_works_with_every_solver():
    for solver in ("euler", "heun", "dpm++", "ddim"):
        made = guided([[2.0, 1.0]], [[1.0, 3.0]], guidance="apg")
        found = solve(made, torch.randn(1, 1, 2), ProbabilityPath("rectified_flow"), 3, solver)
        assert found[0, 0].tolist() == pytest.approx([4.0, -3.0])  # a constant prediction is where it ends
