import torch
from torch import nn

from v2flow_cli.recipe.schema import Quantizer
from v2flow_cli.tokenizer.quantizer_ema import EMAQuantizer
from v2flow_cli.training.state import WeightAverage, flatten_optimizer, restore_optimizer


def test_average_by_hand():
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    average = WeightAverage.of(module, 0.5)
    module.weight.data.fill_(8.0)
    average.update(step=100)
    assert average.weights["weight"].item() == 4.0
    average.copy_to(module)
    assert module.weight.item() == 4.0


def test_statistics_of_the_vectors_lag_with_the_weights_and_codes_do_not():
    module = nn.Sequential(EMAQuantizer(Quantizer(4, 0, "cosine", 0.99, 0, 0.1, 0.0), 2))
    quantizer = module[0]
    codes = quantizer.codebook.clone()
    average = WeightAverage.of(module, 0.5)
    quantizer.mean.fill_(8.0)
    quantizer.std.fill_(3.0)
    quantizer.codebook.mul_(-1)
    average.update(step=100)
    assert quantizer.mean.tolist() == [8.0, 8.0]  # training continues with its own weights
    average.copy_to(module)
    assert quantizer.mean.tolist() == [4.0, 4.0] and quantizer.std.tolist() == [2.0, 2.0]
    assert torch.equal(quantizer.codebook, -codes)


def test_the_window_grows_with_the_step():
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    average = WeightAverage.of(module, 0.999)
    module.weight.data.fill_(1.0)
    average.update(step=0)
    assert abs(average.weights["weight"].item() - 0.9) < 1e-6


def test_optimizer_state_survives_a_round_trip():
    torch.manual_seed(0)
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    two.load_state_dict(one.state_dict())
    first, second = torch.optim.AdamW(one.parameters()), torch.optim.AdamW(two.parameters())
    x = torch.randn(4, 3)
    one(x).sum().backward()
    first.step()
    two.load_state_dict(one.state_dict())
    names = {id(p): n for n, p in one.named_parameters()}
    restore_optimizer(second, {id(p): n for n, p in two.named_parameters()}, flatten_optimizer(first, names))
    for model, optimizer in ((one, first), (two, second)):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(one.weight, two.weight)
