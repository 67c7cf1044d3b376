"""Isometry: zero for a rotation of the latents, gradients towards one, by hand on four tokens."""

import pytest
import torch
import torch.nn.functional as F

from v2flow_cli.tokenizer.isometry import _rotation, isometry_loss


def cells(latents):
    """The lifted directions of the four cells of (B, 2, 4, 4): (B, 4, 9)."""
    rows = torch.cat([latents[:, :, y : y + 2, x : x + 2].flatten(1)[:, None] for y in (0, 2) for x in (0, 2)], 1)
    lift = rows.norm(dim=-1).square().mean().sqrt().expand(*rows.shape[:2], 1)
    return F.normalize(torch.cat([rows, lift], -1), dim=-1)


@pytest.mark.parametrize("width", [8, 32])
def test_rotated_cells_lose_nothing_whatever_their_scale(width):
    torch.manual_seed(0)
    latents = torch.randn(16, 2, 4, 4)
    vectors = cells(latents) @ _rotation(9, width)
    assert isometry_loss(3 * vectors + 5, latents, (2, 2)).item() == pytest.approx(0, abs=1e-5)
    assert isometry_loss(vectors.flip(1), latents, (2, 2)).item() > 0.5  # the right vectors in the wrong places


def test_rotation_keeps_distances():
    rotation = _rotation(8, 32)
    assert torch.allclose(rotation @ rotation.T, torch.eye(8), atol=1e-5)
    assert torch.allclose(_rotation(32, 8).T @ _rotation(32, 8), torch.eye(8), atol=1e-5)
    assert torch.equal(_rotation(8, 32), _rotation(8, 32))


def test_by_hand():
    """Two tokens on either side of the mean: directions of opposite sign, so a swap is at squared distance 4."""
    latents = torch.tensor([[[[1.0, 3.0]]]])  # lifted by sqrt(5): (1, 2.236) and (3, 2.236), then at unit length
    lifted = F.normalize(torch.tensor([[1.0, 5**0.5], [3.0, 5**0.5]]), dim=-1) @ _rotation(2, 2)
    right = 10 * lifted[None] + 7
    assert isometry_loss(right, latents, (1, 2)).item() == pytest.approx(0, abs=1e-5)
    assert isometry_loss(right.flip(1), latents, (1, 2)).item() == pytest.approx(4, abs=1e-5)


def test_cells_of_one_direction_and_two_lengths_are_told_apart():
    torch.manual_seed(0)
    cell = torch.randn(2)
    latents = torch.stack([cell, 2 * cell, -cell, torch.zeros(2)], dim=-1)[None, :, None]
    same = torch.stack([cell, cell, -cell, torch.zeros(2)])[None]
    assert isometry_loss(same, latents, (1, 4)).item() > 0.1


def test_descent_brings_vectors_to_the_latents_distances():
    torch.manual_seed(0)
    latents = torch.randn(32, 2, 4, 4)
    vectors = torch.randn(32, 4, 16, requires_grad=True)
    before = isometry_loss(vectors, latents, (2, 2))
    for _ in range(200):
        loss = isometry_loss(vectors, latents, (2, 2))
        (gradient,) = torch.autograd.grad(loss, vectors)
        vectors = (vectors - 100 * gradient).detach().requires_grad_()
    assert loss < 0.05 * before

    def cosines(rows):
        rows = F.normalize((rows - rows.mean(0)) / rows.std(0), dim=-1)
        return (rows @ rows.T).flatten()

    wanted = cosines(cells(latents).flatten(0, 1) @ _rotation(9, 16))
    assert torch.corrcoef(torch.stack([cosines(vectors.flatten(0, 1)), wanted]))[0, 1] > 0.95


def test_latents_coarser_than_the_tokens_are_refused():
    with pytest.raises(ValueError, match=r"set loss.isometry to 0"):
        isometry_loss(torch.zeros(1, 16, 4), torch.zeros(1, 2, 2, 2), (4, 4))
