import torch

from v2flow_cli.tokenizer.prefix import TokenEmbedding, sample_lengths


def lengths(kind, max_tokens, count=4000):
    torch.manual_seed(0)
    return sample_lengths(kind, count, max_tokens, torch.device("cpu"))


def test_lengths_of_nested_dropout():
    uniform, counts = lengths("uniform", 6).unique(return_counts=True)
    assert uniform.tolist() == [1, 2, 3, 4, 5, 6] and counts.min() > 500
    assert lengths("power_of_two", 256).unique().tolist() == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert lengths("power_of_two", 6).unique().tolist() == [1, 2, 4, 6]
    mixed, counts = lengths("mixed", 256, 40_000).unique(return_counts=True)
    assert mixed.tolist() == list(range(1, 257))  # every length, and the powers of two from 8 on much more often
    assert (counts > 10 * counts.float().median()).nonzero().flatten().tolist() == [7, 15, 31, 63, 127, 255]
    assert lengths("mixed", 6).unique().tolist() == [1, 2, 3, 4, 5, 6]
    assert lengths("none", 6).unique().tolist() == [6]


def embedding():
    torch.manual_seed(0)
    return TokenEmbedding(3, 8, max_tokens=5)


def test_the_first_k_tokens_are_kept_and_the_rest_become_the_mask_token():
    made, codes = embedding(), torch.randn(2, 5, 3)
    x = made(codes, torch.tensor([2, 5]))
    whole = made(codes)
    assert torch.equal(x[0, :2], whole[0, :2]) and torch.equal(x[1], whole[1])
    assert torch.equal(x[0, 2:], made.mask_token + made.order[2:])


def test_a_short_row_is_a_prefix_of_the_long_one():
    made, codes = embedding(), torch.randn(2, 5, 3)
    assert torch.allclose(made(codes[:, :2]), made(codes, torch.tensor([2, 2])))  # products round by their row count


def test_without_an_order_it_is_a_plain_linear_map():
    made, codes = TokenEmbedding(3, 8), torch.randn(2, 5, 3)
    assert torch.equal(made(codes), codes @ made.weight.T + made.bias)
    assert set(dict(made.named_parameters())) == {"weight", "bias"}
