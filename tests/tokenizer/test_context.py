import pytest
import torch
import torch.nn.functional as F

from v2flow_cli.recipe.schema import Context
from v2flow_cli.tokenizer.context import (
    MaskedTransformer,
    RotaryPositions,
    attention,
    grid_coordinates,
    grid_token_index,
    rotate,
)


def transformer():
    torch.manual_seed(0)
    return MaskedTransformer(Context(32, 2, 2, 2, 2.0, 0.0, 0.7, 0.25), token_size=8, patch_size=12).eval()


def inputs(seen=3):
    tokens, patches = torch.randn(2, 16, 8), torch.randn(2, 16, 12)
    at = grid_coordinates(4, 4, 4, 4, torch.device("cpu")).expand(2, -1, -1)
    cells = grid_token_index(4, 4, 4, 4, torch.device("cpu")).expand(2, -1)
    return tokens, at, patches[:, :seen], at[:, :seen], at[:, seen:], cells[:, seen:]


def test_hidden_positions_do_not_affect_each_other():
    model, (tokens, at, patches, seen_at, hidden_at, cells) = transformer(), inputs()
    whole = model(tokens, at, patches, seen_at, hidden_at, cells)
    part = model(tokens, at, patches, seen_at, hidden_at[:, 4:7], cells[:, 4:7])
    assert torch.allclose(whole[:, 4:7], part, atol=1e-5)


def test_tokens_and_visible_patches_both_matter():
    model, (tokens, at, patches, seen_at, hidden_at, cells) = transformer(), inputs()
    base = model(tokens, at, patches, seen_at, hidden_at, cells)
    assert not torch.allclose(base, model(tokens + 1, at, patches, seen_at, hidden_at, cells), atol=1e-3)
    assert not torch.allclose(base, model(tokens, at, patches + 1, seen_at, hidden_at, cells), atol=1e-3)


def test_the_dummy_is_one_token_and_needs_no_tokens():
    model, (_, _, patches, seen_at, hidden_at, cells) = transformer(), inputs(seen=0)
    assert model(None, None, patches, seen_at, hidden_at, cells).shape == (2, 16, 32)


def test_attention_depends_on_relative_positions_only():
    model, (tokens, at, patches, seen_at, hidden_at, cells) = transformer(), inputs()
    base = model(tokens, at, patches, seen_at, hidden_at, cells)
    moved = model(tokens, at + 7, patches, seen_at + 7, hidden_at + 7, cells)
    assert torch.allclose(base, moved, atol=1e-4)


def test_rotation_keeps_lengths():
    x, angles = torch.randn(1, 2, 5, 16), RotaryPositions(16)(torch.randn(1, 5, 2))
    assert torch.allclose(rotate(x, angles).norm(dim=-1), x.norm(dim=-1), atol=1e-5)


def test_coarser_token_grids_sit_at_the_centres_of_their_cells():
    centres = grid_coordinates(2, 2, 4, 4, torch.device("cpu"))
    assert centres.tolist() == [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]


def test_each_patch_lies_in_the_cell_of_its_token():
    # Four by four patches over 2 x 4 tokens: rows 0 and 1 share the first row of tokens.
    cells = grid_token_index(2, 4, 4, 4, torch.device("cpu")).view(4, 4)
    assert cells.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]]


@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_bf16_training_is_that_of_the_fused_function(causal):
    torch.manual_seed(0)
    exact = [torch.randn(2, 3, 40, 16, requires_grad=True) for _ in range(3)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    mask = torch.ones(40, 40, dtype=torch.bool).tril() if causal else None
    expected, got = F.scaled_dot_product_attention(*exact, attn_mask=mask), attention(*rounded, mask)
    assert got.dtype == torch.bfloat16 and torch.allclose(got.float(), expected, atol=0.05)
    weights = torch.randn_like(expected)
    expected.backward(weights)
    got.backward(weights.bfloat16())
    for x, y in zip(rounded, exact, strict=True):
        assert (x.grad.float() - y.grad).norm() < 0.02 * y.grad.norm()


@pytest.mark.parametrize(
    ("trained", "dtype", "positions", "fused"),
    [
        (True, torch.bfloat16, 512, False),
        (True, torch.bfloat16, 513, True),
        (True, torch.float32, 8, True),
        (False, torch.bfloat16, 8, True),
    ],
)
def test_plain_attention_only_where_it_is_faster(trained, dtype, positions, fused, monkeypatch):
    calls, original = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or original(*a, **k))
    x = torch.randn(1, 1, positions, 4, dtype=dtype, requires_grad=trained)
    attention(x, x, x)
    assert bool(calls) == fused
