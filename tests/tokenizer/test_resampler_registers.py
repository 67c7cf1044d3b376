import dataclasses

import pytest
import torch

from v2flow_cli.errors import ModelError
from v2flow_cli.recipe.schema import Registers
from v2flow_cli.tokenizer.resampler_registers import RegisterResampler

SETTINGS = Registers("registers", 32, 2, 2, 2.0, 0.0, 2, 6, "spread", True, "uniform")


def resampler(**changes):
    torch.manual_seed(0)
    return RegisterResampler(dataclasses.replace(SETTINGS, **changes), 4, 8).eval()


def test_as_many_tokens_as_registers_at_any_size():
    made = resampler()
    assert made(torch.randn(2, 4, 4, 4)).shape == (2, 6, 32)
    assert made(torch.randn(1, 4, 8, 12)).shape == (1, 6, 32)
    assert made.size_multiple == 16


def test_causal_registers_do_not_attend_to_later_ones():
    latents = torch.randn(1, 4, 4, 4)
    for causal in (True, False):
        made = resampler(causal=causal)
        before = made(latents)
        made.registers.data[3] += torch.randn(32)
        same = torch.isclose(before, made(latents), atol=1e-6).all(-1)[0].tolist()
        assert same == ([True] * 3 + [False] * 3 if causal else [False] * 6)


def test_patches_do_not_attend_to_registers():
    made = resampler()
    assert not made._attention_mask(4, torch.device("cpu"))[:4, 4:].any()
    assert made._attention_mask(4, torch.device("cpu"))[:, :4].all()


def test_the_first_token_depends_on_every_patch():
    made, latents = resampler(), torch.randn(1, 4, 4, 4)
    first = made(latents)[:, 0]
    for y, x in ((0, 0), (3, 3)):
        changed = latents.clone()
        changed[..., y, x] += 1
        assert not torch.allclose(first, made(changed)[:, 0], atol=1e-4)


def test_tokens_depend_on_the_positions_of_patches():
    made, latents = resampler(), torch.randn(1, 4, 4, 4)
    assert not torch.allclose(made(latents), made(latents.flip(-1)), atol=1e-3)


def test_spread_positions_by_hand():
    device = torch.device("cpu")
    tokens, cells, _ = resampler(places="centre").layout(32, 64, 2, 4, device)
    assert tokens.tolist() == [[0.5, 1.5]] * 6 and cells.tolist() == [0] * 8
    tokens, cells, _ = resampler().layout(32, 64, 2, 4, device)
    # The first in the middle, the second 0.7549 and 0.5698 of the sides on: at shares 0.2549 and 0.0698.
    assert torch.allclose(tokens[:2], torch.tensor([[0.5, 1.5], [2 * 0.25488 - 0.5, 4 * 0.06984 - 0.5]]), atol=1e-4)
    nearest = (torch.tensor([[0.0, 0.0]]) - tokens).norm(dim=-1).argmin().item()
    assert cells[0].item() == nearest
    assert tokens.amin() >= -0.5 and (tokens < torch.tensor([1.5, 3.5])).all()


def test_places_on_a_grid_take_every_cell_once_from_the_middle_outwards():
    device = torch.device("cpu")
    tokens, cells, _ = resampler(places="grid", max_tokens=16).layout(64, 64, 4, 4, device)
    assert sorted(tokens.tolist()) == [[float(y), float(x)] for y in range(4) for x in range(4)]
    assert sorted(cells.tolist()) == list(range(16))
    assert tokens[0].tolist() == [1, 1]  # of the four cells around the middle the first
    # The second point of the spread sequence lies at shares 0.2549 and 0.0698: row 1, column 0.
    assert tokens[1].tolist() == [1, 0]
    quarters = {(y > 1.5, x > 1.5) for y, x in tokens[:5].tolist()}
    assert len(quarters) == 4  # so few cover the image


def test_a_grid_of_registers_is_square():
    with pytest.raises(ValueError, match="a square number of registers, not 6"):
        resampler(places="grid")


def test_a_stem_starts_as_its_grid_in_another_order():
    made = resampler(places="grid", max_tokens=256, stem=(1, 1))
    latents = torch.randn(2, 4, 32, 32)
    tokens = made(latents)
    cells = made.layout(256, 256, 16, 16, torch.device("cpu"))[1]  # the token of each patch
    assert torch.allclose(tokens[:, cells], made.grid(latents), atol=1e-5)
    torch.nn.init.normal_(made.blocks[0].out.weight)
    assert not torch.allclose(tokens, made(latents), atol=1e-2)


def test_a_stem_needs_a_grid_of_patches():
    with pytest.raises(ModelError, match=r"makes 32 x 32 patches at 256 px .* expected 8 x 8 or 16 x 16"):
        resampler(stem=(1, 1), patch_size=1)
