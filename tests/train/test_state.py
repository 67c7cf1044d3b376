import torch
from torch import nn

from v2flow_cli.train.state import WeightAverage, flatten_optimizer, restore_optimizer


def test_average_by_hand():
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    average = WeightAverage.of(module, 0.5)
    module.weight.data.fill_(8.0)
    average.update(module, step=100)
    assert average.weights["weight"].item() == 4.0
    average.copy_to(module)
    assert module.weight.item() == 4.0


def test_the_window_grows_with_the_step():
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    average = WeightAverage.of(module, 0.999)
    module.weight.data.fill_(1.0)
    average.update(module, step=0)
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
