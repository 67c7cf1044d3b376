"""FSQ by hand: levels 5 and 4, whose 20 codes can be computed by hand."""

import pytest
import torch

from v2flow_cli.recipe.schema import FSQ
from v2flow_cli.tokenizer.quantizer_fsq import FSQQuantizer


def quantizer(levels=(5, 4), vector_size=2):
    torch.manual_seed(0)
    return FSQQuantizer(FSQ("fsq", levels, 0.0), vector_size)


def test_codes_by_hand():
    # Five levels are -2 to 2 steps, four are -2 to 1; an id is first + 5 second, counted from the lowest.
    vectors = torch.tensor([[[0.0, 0.0], [9.0, 9.0], [-9.0, -9.0], [9.0, -9.0]]])
    out = quantizer()(vectors)
    assert out.token_ids.tolist() == [[2 + 5 * 2, 4 + 5 * 3, 0, 4]]
    assert torch.allclose(out.embeddings, torch.tensor([[[0.0, 0.0], [1.0, 0.5], [-1.0, -1.0], [1.0, -1.0]]]))
    assert out.commit_loss == 0


def test_levels_follow_the_formula():
    # Odd L: the k-th border is where tanh(x) (L - 1) / 2 (1 + 1e-3) is k + 1/2; for L = 5 the first at 0.2548.
    out = quantizer((5,), 1)(torch.tensor([[[0.254], [0.256]]]))
    assert out.token_ids.tolist() == [[2, 3]]


@pytest.mark.parametrize("levels", [(2,), (3, 2), (8, 8, 8, 5, 5, 5)])
def test_every_id_is_a_code_and_every_code_its_id(levels):
    made = quantizer(levels, len(levels))
    ids = torch.arange(made.settings.codebook_size)[None]
    codes = made.embed(ids)
    assert codes.abs().max() <= 1 and len(codes[0].unique(dim=0)) == made.settings.codebook_size
    half = torch.tensor(levels) // 2
    steps = codes * half
    # The middle of a code's own cell, taken back through the bound, has to give the code again.
    width, offset = (torch.tensor(levels) - 1) * 1.001 / 2, 0.5 * (torch.tensor(levels) % 2 == 0)
    inside = torch.atanh((steps + offset) / width) - torch.atanh(offset / width)
    assert torch.equal(made(inside).token_ids, ids)
    assert torch.equal(made.vectors, codes[0])


def test_paper_size():
    assert FSQ("fsq", (8, 8, 8, 5, 5, 5), 0.0).codebook_size == 64_000


def test_the_gradient_is_that_without_rounding():
    vectors = torch.zeros(1, 1, 2, requires_grad=True)
    quantizer()(vectors).embeddings[0, 0, 0].backward()
    assert vectors.grad[0, 0].tolist() == pytest.approx([2 * 1.001 / 2, 0.0])  # tanh has slope 1 at 0


def test_a_wide_vector_is_projected_and_has_a_commitment_loss():
    made = quantizer((5, 4), 7)
    out = made(torch.randn(2, 3, 7), step=0)
    assert out.embeddings.shape == (2, 3, 7) and out.commit_loss > 0
    assert torch.allclose(made.embed(out.token_ids), out.embeddings, atol=1e-6)
    assert made.vectors.shape == (20, 7)


def test_usage_counts_recent_codes():
    made = quantizer()
    for step in range(3):
        made(torch.tensor([[[0.0, 0.0], [9.0, 9.0]]]), step=step)
    figures = made.statistics()
    assert figures["codebook_usage"] == pytest.approx(2 / 20)
    assert figures["perplexity"] == pytest.approx(2.0, abs=1e-3)
