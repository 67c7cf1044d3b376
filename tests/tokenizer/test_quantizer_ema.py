"""A four-entry codebook by hand, and the replacement of dead codes."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from v2flow_cli.recipe.schema import Quantizer
from v2flow_cli.tokenizer.quantizer_ema import EMAQuantizer, rotated_onto


def quantizer(distance="euclidean", size=4, start_step=0, revive_after=0.0, decay=0.5, **more):
    settings = Quantizer(size, 2, distance, decay, start_step, revive_after, usage_floor=0.0, **more)
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


def test_euclidean_and_cosine_distance_differ():
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


def test_rotation_gives_the_codes_and_turns_the_gradient_back():
    vectors = torch.tensor([[[2.0, 0.0]]], requires_grad=True)
    codes = torch.tensor([[[0.0, 1.0]]])  # a quarter turn, and half as long
    out = rotated_onto(vectors, codes)
    assert torch.allclose(out, codes, atol=1e-6)
    out[..., 1].sum().backward()  # moving the output along the code is moving the vector along itself, by twice as much
    assert torch.allclose(vectors.grad, torch.tensor([[[0.5, 0.0]]]), atol=1e-6)


def test_rotation_and_straight_through_agree_on_ids_and_codes():
    vectors = torch.randn(2, 5, 2)
    copied, turned = quantizer()(vectors), quantizer(gradient="rotation")(vectors)
    assert torch.equal(copied.token_ids, turned.token_ids)
    assert torch.allclose(copied.embeddings, turned.embeddings, atol=1e-5)


def test_commit_loss_is_the_squared_distance():
    out = quantizer()(torch.tensor([[[1.0, 0.5]]]))
    assert torch.isclose(out.commit_loss, torch.tensor(0.25))


def test_ema_update_by_hand(monkeypatch):
    monkeypatch.setattr("v2flow_cli.tokenizer.quantizer_ema.STATISTICS_RATE", 0.0)  # vectors as they are
    made = quantizer(decay=0.5)
    made.counts.fill_(1.0)
    made(torch.tensor([[[3.0, 0.0], [1.0, 1.2]]]), step=1)
    # Code 0 takes the first vector, code 1 the second; each code moves half way, others stay.
    assert torch.allclose(made.codebook[0], torch.tensor([2.0, 0.0]))
    assert torch.allclose(made.codebook[1], torch.tensor([0.5, 1.1]))
    assert torch.allclose(made.codebook[2:], torch.tensor([[-1.0, 0], [0, -1]]))
    assert torch.allclose(made.counts, torch.tensor([1.0, 1.0, 0.5, 0.5]))


def test_nothing_is_quantised_before_the_start_and_the_ring_holds_real_vectors():
    made = quantizer("cosine", size=6, start_step=2)
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


def test_dead_codes_are_replaced_with_their_state():
    torch.manual_seed(0)
    made = quantizer(size=64, revive_after=0.5, decay=0.5)
    made.codebook.copy_(100 + torch.randn(64, 2))  # far from every vector
    cloud = torch.randn(1, 32, 2)
    for step in range(40):
        made(cloud, step=step)
    assert made.statistics()["codebook_usage"] > 0.3
    assert (made.codebook.abs().amax(1) < 10).float().mean() > 0.8


def test_kmeans_by_hand(monkeypatch):
    monkeypatch.setattr("v2flow_cli.tokenizer.quantizer_ema.STATISTICS_RATE", 0.0)  # vectors as they are
    made = quantizer(size=2, start_step=4, kmeans_steps=2)
    made.codebook.copy_(torch.tensor([[0.0, 1.0], [10.0, 0.0]]))  # of the ring, the first vectors of each mean
    made(torch.tensor([[[1.0, 0.0], [2.0, 2.0]]]), step=1)
    made(torch.tensor([[[12.0, 0.0], [2.0, 4.0]]]), step=2)
    assert torch.allclose(made.codebook, torch.tensor([[5 / 4, 7 / 4], [11.0, 0.0]]))


def test_kmeans_finds_the_clusters_that_the_ring_only_samples():
    def codebook_error(kmeans_steps):
        torch.manual_seed(0)
        made = quantizer(size=8, start_step=60, kmeans_steps=kmeans_steps)
        for step in range(60):
            angles = torch.arange(8).repeat(8) * torch.pi / 4
            circle = torch.stack([angles.cos(), angles.sin()], -1) + 0.1 * torch.randn(64, 2)
            made(circle[torch.randperm(64)][None], step=step)
        assert torch.allclose(made.counts, torch.tensor(8.0))  # every code starts as an average one
        points = circle[None] / made.std
        return (points - made.codebook[made.nearest(points)]).square().sum(-1).mean()

    assert codebook_error(50) < 0.7 * codebook_error(0)


def test_usage_decay_finds_dead_codes_before_ema_decay():
    def steps_to_revival(**more):
        torch.manual_seed(0)
        made = quantizer(size=64, revive_after=0.1, decay=0.99, **more)
        made.codebook[0] = 1000.0
        made.counts.fill_(8.0)
        for step in range(400):
            made(torch.randn(1, 512, 2), step=step)
            if made.codebook[0, 0] < 100:
                return step
        return 400

    assert steps_to_revival() > 200
    assert steps_to_revival(usage_decay=0.9) < 30


def test_a_replaced_code_starts_with_mean_counts():
    torch.manual_seed(0)
    made = quantizer(size=8, revive_after=0.5, decay=0.9, usage_decay=0.5)
    made.codebook[:] = torch.tensor([[0.0, 0.0]] + [[100.0, 100.0]] * 7)
    for step in range(4):
        made(torch.randn(1, 64, 2), step=step)
    assert (made.usage >= 0.5 * made.usage.mean()).all() and (made.codebook.abs() < 10).all()


def test_a_frozen_codebook_never_changes():
    made = quantizer()
    before = made.codebook.clone()
    made(torch.randn(2, 5, 2), step=None)
    assert torch.equal(before, made.codebook)


def test_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert quantizer()(torch.randn(1, 3, 2).bfloat16()).embeddings.dtype == torch.float32


def _one_rank(rank, folder):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)
    made = quantizer("cosine", size=64, start_step=4, revive_after=0.3, decay=0.9, kmeans_steps=2, usage_decay=0.7)
    made.load_state_dict(quantizer_state())
    for step in range(12):
        made(torch.randn(1, 48, 2), step=step)
    save_file(made.state_dict(), f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


def quantizer_state():
    torch.manual_seed(7)
    return quantizer("cosine", size=64, usage_decay=0.7).state_dict()


@pytest.mark.slow
def test_ranks_with_different_vectors_keep_one_codebook(tmp_path):
    torch.multiprocessing.spawn(_one_rank, (tmp_path,), nprocs=2)
    one, two = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["codebook"], quantizer_state()["codebook"])
