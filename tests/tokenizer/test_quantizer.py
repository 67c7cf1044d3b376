"""A four-entry codebook by hand, and the life of codes."""

import pytest
import torch
import torch.nn.functional as F

from v2flow_cli.recipe.schema import Quantizer
from v2flow_cli.tokenizer.quantizer import EMAQuantizer


def quantizer(distance="euclidean", size=4, start_step=0, revive_after=0.0, decay=0.5):
    settings = Quantizer(size, 2, distance, decay, start_step, revive_after, usage_floor=0.0)
    made = EMAQuantizer(settings, 2)
    if size == 4:
        made.codebook.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]))
    return made


def test_ids_by_hand():
    vectors = torch.tensor([[[0.9, 0.2], [0.1, 3.0], [-0.4, 0.3], [0.2, -0.3]]])
    for distance in ("euclidean", "cosine"):
        out = quantizer(distance)(vectors)
        assert out.token_ids.tolist() == [[0, 1, 2, 3]]
        assert torch.allclose(out.embeddings, quantizer(distance).embed(torch.tensor([[0, 1, 2, 3]])))


def test_euclidean_and_cosine_differ_where_they_must():
    book = torch.tensor([[10.0, 0], [0.5, 0.5], [0, 1], [0, -1]])
    far = torch.tensor([[[1.0, 0.1]]])
    near, angle = quantizer("euclidean"), quantizer("cosine")
    near.codebook.copy_(book)
    angle.codebook.copy_(F.normalize(book, dim=-1))
    assert near(far).token_ids.item() == 1
    assert angle(far).token_ids.item() == 0


def test_straight_through_gradient_is_the_identity():
    vectors = torch.randn(1, 3, 2, requires_grad=True)
    weight = torch.randn(1, 3, 2)
    (quantizer()(vectors).embeddings * weight).sum().backward()
    assert torch.allclose(vectors.grad, weight)


def test_commit_loss_is_the_squared_distance():
    out = quantizer()(torch.tensor([[[1.0, 0.5]]]))
    assert torch.isclose(out.commit_loss, torch.tensor(0.25))


def test_ema_update_by_hand(monkeypatch):
    monkeypatch.setattr("v2flow_cli.tokenizer.quantizer.STATISTICS_RATE", 0.0)  # vectors as they are
    made = quantizer(decay=0.5)
    made.counts.fill_(1.0)
    made(torch.tensor([[[3.0, 0.0], [1.0, 1.2]]]), step=1)
    # Code 0 takes the first vector, code 1 the second; each code moves half way, others stay.
    assert torch.allclose(made.codebook[0], torch.tensor([2.0, 0.0]))
    assert torch.allclose(made.codebook[1], torch.tensor([0.5, 1.1]))
    assert torch.allclose(made.codebook[2:], torch.tensor([[-1.0, 0], [0, -1]]))
    assert torch.allclose(made.counts, torch.tensor([1.0, 1.0, 0.5, 0.5]))


def test_nothing_is_quantised_before_the_start_and_the_ring_holds_real_vectors():
    made = quantizer("cosine", size=6, start_step=5)
    vectors = F.normalize(torch.randn(1, 4, 2), dim=-1)
    first, second = made(vectors, step=0), made(-vectors, step=1)
    assert torch.equal(first.commit_loss, torch.tensor(0.0))
    rows = torch.cat([first.embeddings[0], second.embeddings[0]]) / 2**0.5
    assert (torch.cdist(made.codebook, rows).min(1).values < 1e-5).all()
    assert torch.allclose(made.counts, torch.full((6,), 4 / 6))


def test_vectors_are_standardised_and_the_codes_map_back():
    torch.manual_seed(0)
    made = quantizer("cosine", size=64, start_step=2)
    cone = 50 + torch.tensor([0.1, 3.0]) * torch.randn(1, 500, 2)
    out = made(cone, step=0)
    standard = (cone - cone.mean((0, 1))) / cone[0].std(0)
    assert torch.allclose(out.embeddings, 2**0.5 * F.normalize(standard, dim=-1), atol=1e-3)
    assert made.vectors.mean(0) == pytest.approx(cone[0].mean(0), rel=0.02)
    assert made.vectors.std(0) == pytest.approx(cone[0].std(0), rel=0.3)


def test_dead_codes_are_reborn_with_their_state():
    torch.manual_seed(0)
    made = quantizer(size=64, revive_after=0.5, decay=0.5)
    made.codebook.copy_(100 + torch.randn(64, 2))  # far from every vector
    cloud = torch.randn(1, 32, 2)
    for step in range(40):
        made(cloud, step=step)
    assert made.statistics()["codebook_usage"] > 0.3
    assert (made.codebook.abs().amax(1) < 10).float().mean() > 0.8


def test_a_frozen_codebook_never_changes():
    made = quantizer()
    before = made.codebook.clone()
    made(torch.randn(2, 5, 2), step=None)
    assert torch.equal(before, made.codebook)


def test_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert quantizer()(torch.randn(1, 3, 2).bfloat16()).embeddings.dtype == torch.float32
