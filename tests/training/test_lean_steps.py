"""Training steps that never make the host wait, are one graph, and leave out a bad step on the device."""

import json
import random
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from v2flow_cli.errors import V2FlowError
from v2flow_cli.recipe import load_recipe
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.training import loop
from v2flow_cli.training.loop import build_objective, train
from v2flow_cli.training.objectives.autoencoder import AutoencoderObjective
from v2flow_cli.training.objectives.tokenizer import TokenizerObjective, build_config

from ..conftest import RECIPES
from .conftest import quiet, recipe


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The host reads numbers only when it logs, and AdamW is one kernel; both work on a CPU too."""
    monkeypatch.setattr("v2flow_cli.training.loop._defers_reading", lambda device: True)
    monkeypatch.setattr("v2flow_cli.training.optimizer.fuses", lambda device: True)


class Shapes(TorchDispatchMode):
    """Counts operations that make the host wait for a GPU: a number read back, a shape that depends on values."""

    def __init__(self, found) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        boolean = any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:2]))
        if name in ("_local_scalar_dense", "nonzero", "masked_select") or (name.startswith("index") and boolean):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Counts methods that copy a tensor to the host, which no operation shows where it is there already."""

    def __init__(self, found) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__"):
            self.found[func.__name__] += 1
        return func(*args, **(kwargs or {}))


DECODER = ("loss.pixels=0.5", "loss.ssim=1.0", "loss.pixel_share=0.5")
STAGES = {
    "autoencoder": ("autoencoder",),
    "autoencoder by Muon": ("autoencoder", "optimizer.kind=muon", "train.skip_bad_steps=1"),
    "tokenizer": ("tokenizer", "vocabulary.gumbel_ramp_steps=9", "quantizer.start_step=4"),
    "decoder": ("tokenizer", *DECODER, "optimizer.kind=muon", "freeze_tokens=true"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_no_step_waits_for_the_device_between_log_lines(world, tmp_path, as_on_a_gpu, stage):
    name, *changes = STAGES[stage]
    if "freeze_tokens=true" in changes:
        first = recipe(world, "tokenizer", tmp_path / "first", "train.steps=1", "train.grid_every=0")
        changes.append(f"init_from={train(first, resume=False, log=quiet).folder}")
    plumbing = ("train.steps=6", "train.log_every=6", "train.save_every=0", "train.grid_every=0", "data.workers=0")
    found, counts = Counter(), []
    with Shapes(found), Reads(found):
        made = recipe(world, name, tmp_path / "out", *plumbing, *changes)
        train(made, resume=False, log=quiet, at_step=lambda step: counts.append(found.total()))
    assert counts[1:5] == [counts[0]] * 4, found
    assert counts[5] > counts[4]  # the log line
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 6 and line["train/grad_norm"] > 0


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_bad_step_is_left_out_on_the_device(world, tmp_path, monkeypatch, kind):
    """The same weights as if the host checked every step before it changes them."""
    plain = TokenizerObjective.forward

    def forward(self, *args, **named):
        terms = plain(self, *args, **named)
        forward.calls += 1
        return {**terms, "loss": terms["loss"] * (torch.nan if forward.calls == 3 else 1)}

    monkeypatch.setattr(TokenizerObjective, "forward", forward)
    more = ("train.steps=5", "train.log_every=5", "train.skip_bad_steps=1", "optimizer.schedule=constant")
    more += ("optimizer.warmup_steps=0", f"optimizer.kind={kind}", "train.save_every=0", "train.grid_every=0")
    more += ("quantizer.start_step=0", "vocabulary.gumbel_noise=0")  # what hangs on the step's number is one late
    states, lines = [], []
    for folder in ("host", "device"):
        if folder == "device":
            monkeypatch.setattr("v2flow_cli.training.loop._defers_reading", lambda device: True)
        monkeypatch.setattr("v2flow_cli.training.optimizer.fuses", lambda device: True)
        forward.calls = 0
        made = recipe(world, "tokenizer", tmp_path / folder, *more)
        assert train(made, resume=False, log=lines.append).steps == 5 and forward.calls == 6
        states.append(load_file(tmp_path / folder / "checkpoints" / "step-00000005" / "model.safetensors"))
    assert all(torch.isfinite(value).all() for value in states[1].values() if value.is_floating_point())
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], atol=1e-6), name
    assert sum("step 2, rank 0: the loss is not finite (nan) on samples" in line for line in lines) == 2


def test_a_bad_step_that_may_not_be_skipped_is_reported_at_the_log_line(world, tmp_path, as_on_a_gpu, monkeypatch):
    plain = AutoencoderObjective.forward

    def forward(self, *args, **named):
        terms = plain(self, *args, **named)
        return {**terms, "loss": terms["loss"] * torch.nan}

    monkeypatch.setattr(AutoencoderObjective, "forward", forward)
    broken = recipe(world, "autoencoder", tmp_path / "n", "train.steps=4", "train.log_every=2")
    with pytest.raises(V2FlowError, match=r"step 0, rank 0: the loss is not finite .* on samples \w+"):
        train(broken, resume=False, log=quiet)
    assert not (tmp_path / "n" / "checkpoints").exists()


TINY = (
    "data.crop_size=64",
    "vocabulary.llm=lm",
    "resampler.hidden_size=16",
    "quantizer.codebook_size=64",
    "quantizer.start_step=0",
    "context.hidden_size=16",
    "context.num_heads=2",
    "flow.hidden_size=16",
    "optimizer.kind=adamw",
)
AUTOENCODER = {"class": "V2FlowAutoencoder", "latent_channels": 4, "encoder_width": 8, "encoder_depth": 1}
AUTOENCODER |= {"decoder_width": 8, "decoder_depth": 1}


@pytest.mark.parametrize("name", ["autoencoder", "tokenizer", "tokenizer_256", "tokenizer_decoder"])
def test_the_step_of_a_default_recipe_is_one_graph(name):
    """Forward and backward, traced without a break, and the same loss as the plain function."""
    path = RECIPES / "default" / f"{name}.yaml"
    torch._dynamo.reset()
    torch.manual_seed(0)
    if name == "autoencoder":
        sizes = ("encoder_width=8", "encoder_depth=1", "decoder_width=8", "decoder_depth=1")
        objective = build_objective(load_recipe(path, [f"model.{size}" for size in sizes]))
    else:
        made = load_recipe(path, TINY)
        model = V2FlowTokenizer(build_config(made, AUTOENCODER, (80, 16)))
        model.vocabulary.set_table(torch.randn(80, 16))
        objective = TokenizerObjective(made, model)
    objective.train()
    start = {key: value.clone() for key, value in objective.state_dict().items()}
    inputs = {"images": torch.rand(4, 3, 64, 64) * 2 - 1}
    losses, gradients = [], []
    compiled = torch.compile(objective.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    for step in (objective.forward, compiled):
        objective.load_state_dict(start)
        objective.zero_grad()
        torch.manual_seed(1)
        planned = objective.plan(7, inputs, random.Random(0), coarse=True)
        terms = step(**inputs, **planned)
        terms["loss"].backward()
        losses.append(terms["loss"].item())
        gradients.append(sum(p.grad.abs().sum().item() for p in objective.parameters() if p.grad is not None))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert gradients[1] == pytest.approx(gradients[0], rel=1e-3)


def test_it_is_compiled_for_a_gpu_alone(world, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(loop, "_compile", compiled.append)
    train(recipe(world, "autoencoder", tmp_path / "a", "train.steps=1"), resume=False, log=quiet)
    assert not compiled


@pytest.mark.parametrize("name", ["tokenizer_256", "tokenizer_decoder"])
def test_the_forward_pass_runs_under_the_autocast_rules_of_cuda(name):
    """On tensors without data: their devices and types are checked, and a number read back would raise."""
    made = load_recipe(RECIPES / "default" / f"{name}.yaml", TINY)
    with FakeTensorMode(), torch.device("cuda"):
        objective = TokenizerObjective(made, V2FlowTokenizer(build_config(made, AUTOENCODER, (80, 16)))).train()
        inputs = {"images": torch.rand(4, 3, 64, 64)}
    planned = objective.plan(7, inputs, random.Random(0), coarse=True)
    with inputs["images"].fake_mode, torch.autocast("cuda", torch.bfloat16):
        terms = objective(**inputs, **planned)
    assert {(term.device.type, term.dtype) for term in terms.values()} == {("cuda", torch.float32)}
