import torch

from v2flow_cli.tokenizer.masking import random_orders, reveal_schedule, sample_mask_ratio, seeded_orders


def test_mask_ratios_are_a_truncated_normal():
    torch.manual_seed(0)
    ratios = torch.tensor([sample_mask_ratio(0.7, 0.25) for _ in range(4000)])
    assert ratios.min() >= 0.7 and ratios.max() <= 1.0
    # Mean of |x| for N(0, 0.25) truncated to [0, 0.3]: 0.25 (phi(0) - phi(1.2)) / (Phi(1.2) - 1/2) = 0.1330.
    assert abs((1 - ratios).mean() - 0.1330) < 0.006


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
