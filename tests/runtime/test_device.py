import pytest
import torch

from v2flow_cli.errors import V2FlowError
from v2flow_cli.runtime.device import pick_device, pick_dtype


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_of_a_launch_gets_its_own_gpu(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_device(name) == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device(name) == torch.device("cuda:3")
    monkeypatch.setenv("LOCAL_RANK", "5")  # more processes than GPUs share them
    assert pick_device(name) == torch.device("cuda:1")


def test_unknown_device_names_are_refused():
    with pytest.raises(V2FlowError, match="--device no-such-thing: not available here"):
        pick_device("no-such-thing")
    with pytest.raises(V2FlowError, match="--dtype fp8: expected auto, fp32 or bf16"):
        pick_dtype("fp8", torch.device("cpu"))
