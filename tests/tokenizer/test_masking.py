import torch

from v2flow_cli.tokenizer.masking import hidden_patches, mask_ratio, random_orders, reveal_schedule, seeded_orders


def test_mask_ratios_are_a_truncated_normal():
    ratios = torch.tensor([mask_ratio(0.7, 0.25, (i + 0.5) / 4000) for i in range(4000)])
    assert mask_ratio(0.7, 0.005, 0.0) == 0.7  # the normal's density there is below the smallest float
    assert ratios.min() >= 0.7 and ratios.max() <= 1.0
    # Mean of |x| for N(0, 0.25) truncated to [0, 0.3]: 0.25 (phi(0) - phi(1.2)) / (Phi(1.2) - 1/2) = 0.1330.
    assert abs((1 - ratios).mean() - 0.1330) < 0.006


def test_few_shapes_are_a_multiple_of_an_eighth():
    assert [hidden_patches(r, 256, coarse=False) for r in (0.0, 0.7, 1.0)] == [1, 180, 256]
    assert {hidden_patches(0.7 + i / 1000, 256, coarse=True) for i in range(300)} == {192, 224, 256}
    assert [hidden_patches(r, 3, coarse=True) for r in (0.1, 0.5, 1.0)] == [1, 2, 3]


def test_every_position_is_revealed_once():
    for positions in (1, 7, 64, 256):
        for rounds in (1, 2, 4, 8, 300):
            counts = reveal_schedule(positions, rounds)
            assert sum(counts) == positions and min(counts) >= 1 and len(counts) == min(rounds, positions)


def test_the_schedule_is_the_cosine():
    # 64 positions, 4 rounds: 64 cos(pi/8) = 59.1, 64 cos(pi/4) = 45.3, 64 cos(3 pi/8) = 24.5 stay hidden.
    assert reveal_schedule(64, 4) == [5, 14, 21, 24]


def test_orders_are_permutations_and_depend_on_the_seed_alone():
    assert random_orders(3, 10, torch.device("cpu")).sort(-1).values.tolist() == [list(range(10))] * 3
    pair = seeded_orders([5, 9], 20, torch.device("cpu"))
    assert torch.equal(pair[1:], seeded_orders([9], 20, torch.device("cpu")))
    assert not torch.equal(pair[0], pair[1])
