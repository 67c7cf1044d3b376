"""bf16 if a recipe has `precision: auto` and the device is fast at it: training works, and losses are correct."""

import json
import math
import random

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from v2flow_cli.assets import sample_photos
from v2flow_cli.recipe import load_recipe
from v2flow_cli.runtime import device
from v2flow_cli.runtime.device import pick_dtype, tf32
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.preprocess import image_to_tensor
from v2flow_cli.training.loop import train
from v2flow_cli.training.objectives.tokenizer import TokenizerObjective
from v2flow_cli.training.ssim import ssim

from ..conftest import RECIPES, STAGES
from .conftest import TRANSFORMER, quiet, recipe

AUTO = ("train.precision=auto", "train.steps=2", "train.grid_every=2")
KINDS = {
    "autoencoder": ("autoencoder",),
    "vocabulary": ("tokenizer",),
    "pixel losses": ("tokenizer", "loss.pixels=0.5", "loss.ssim=1.0"),
    "muon": ("tokenizer", "optimizer.kind=muon"),
    "cached latents": ("tokenizer", "latents.cache=memory"),
    "registers, FSQ, flow transformer": ("tokenizer", *TRANSFORMER),
}


@pytest.fixture
def fast_bf16(monkeypatch):
    """As on a GPU, or on a CPU with AMX, whatever this machine is."""
    monkeypatch.setattr(device, "_bf16_is_fast", lambda device_type: True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_recipe_trains_in_bf16(world, tmp_path, fast_bf16, kind):
    name, *changes = KINDS[kind]
    done = train(recipe(world, name, tmp_path / "out", *AUTO, *changes), resume=False, log=quiet)
    assert math.isfinite(done.metrics["train/loss"])
    assert "bf16" in (done.folder / "README.md").read_text()


def test_a_decoder_alone_trains_in_bf16_after_a_stage_in_float32(world, tmp_path, fast_bf16):
    """The second training of a process has another precision than the first."""
    first = train(recipe(world, "tokenizer", tmp_path / "a", "train.steps=1"), resume=False, log=quiet).folder
    more = (f"init_from={first}", "freeze_tokens=true", "loss.ssim=1.0")
    second = train(recipe(world, "tokenizer", tmp_path / "b", *AUTO, *more), resume=False, log=quiet).folder
    last = train(recipe(world, "tokenizer", tmp_path / "c", "train.steps=1"), resume=False, log=quiet).folder
    cards = [(folder / "README.md").read_text() for folder in (first, second, last)]
    assert ["bf16" in card for card in cards] == [False, True, False]


def test_recipes_leave_the_precision_to_the_device():
    """Recipes for any device have auto; with float32 a GPU would not use its fast units."""
    for path in STAGES:
        if path.parent.name != "tiny":  # those are for tests that compare bit for bit
            assert load_recipe(path).train.precision in ("auto", "bf16"), path


def test_ssim_is_that_of_torchmetrics_also_under_autocast():
    torch.manual_seed(0)
    image = torch.nn.functional.interpolate(torch.rand(2, 3, 12, 12), size=48, mode="bicubic").clamp(0, 1)
    noisy = (image + 0.05 * torch.randn_like(image)).requires_grad_()
    wanted = structural_similarity_index_measure(noisy, image, data_range=1.0)
    (gradient,) = torch.autograd.grad(wanted, noisy)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = ssim(noisy, image)
            (ours,) = torch.autograd.grad(found, noisy)
        assert found.item() == pytest.approx(wanted.item(), abs=1e-5)
        assert (ours - gradient).norm() < 1e-3 * gradient.norm()


def test_only_training_rounds_the_factors_of_float32_products(world, tmp_path, monkeypatch):
    def allowed():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before, in_training, in_encode = allowed(), [], []
    plain = V2FlowTokenizer.ids_of_latents
    monkeypatch.setattr(
        V2FlowTokenizer,
        "ids_of_latents",
        lambda *given, **named: (in_encode.append(allowed()), plain(*given, **named))[1],
    )
    for precision in ("auto", "fp32"):
        made = recipe(world, "tokenizer", tmp_path / precision, *AUTO, f"train.precision={precision}")
        train(made, resume=False, log=quiet, at_step=lambda step: in_training.append(allowed()))
    assert set(in_training[:2]) == {(True, True)} and set(in_training[2:]) == {(False, False)}
    assert in_encode and set(in_encode) == {(False, False)}  # the grids of crops
    with tf32(True), tf32(False):
        pass
    assert allowed() == before


def test_checkpoints_come_by_minutes(world, tmp_path, monkeypatch):
    clock = [0.0]

    def tick():
        clock[0] += 10.0  # seconds; the loop asks several times a step
        return clock[0]

    monkeypatch.setattr("v2flow_cli.training.loop.time.monotonic", tick)
    often = ("train.steps=6", "train.save_every=0", "train.save_minutes=0.1", "train.keep_checkpoints=9")
    train(recipe(world, "autoencoder", tmp_path / "often", *often), resume=False, log=quiet)
    assert len(list((tmp_path / "often" / "checkpoints").iterdir())) == 6
    rare = ("train.steps=6", "train.save_every=0", "train.save_minutes=60", "train.keep_checkpoints=9")
    train(recipe(world, "autoencoder", tmp_path / "rare", *rare), resume=False, log=quiet)
    (last,) = (tmp_path / "rare" / "checkpoints").iterdir()
    assert json.loads((last / "state.json").read_text())["step"] == 6


def test_ids_in_bf16_are_those_of_float32():
    """Of the embedded model and the sample photos: only the autoencoder is in bf16."""
    from v2flow_cli.assets import sample_photos

    model = V2FlowTokenizer.from_pretrained()
    photos = [image.convert("RGB").resize((256, 256)) for _, image in sample_photos()]
    images = torch.stack([model.image_processor.preprocess_one(photo, 256) for photo in photos[:2]])
    ids = model.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model.encode(images) == ids).float().mean() >= 0.95
    assert pick_dtype("fp32", torch.device("cpu")) is torch.float32


@pytest.mark.parametrize("name, changes", [("tokenizer_256", ()), ("tokenizer_decoder", ("freeze_tokens=true",))])
def test_losses_under_autocast_are_those_of_float32(name, changes):
    """Each loss term of the embedded model within 1%, and the gradients of the picture losses within 3%."""
    model = V2FlowTokenizer.from_pretrained()
    more = ("init_from=x", "loss.pixels=0.5", "loss.ssim=1.0", *changes)
    objective = TokenizerObjective(load_recipe(RECIPES / "default" / f"{name}.yaml", more), model).train()
    images = torch.stack([image_to_tensor(image, 128) for _, image in sample_photos()][:3])
    start = {key: value.clone() for key, value in objective.state_dict().items()}
    plan = objective.plan(10**6, {"images": images}, random.Random(0))
    latents = model.latents.encode(images)
    drawn = latents + 0.3 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    found, gradients = [], []
    for enabled in (False, True):
        objective.load_state_dict(start)
        torch.manual_seed(0)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append({key: value.item() for key, value in objective(images, **plan).items()})
        given = drawn.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            pictures = objective._image_losses(images, given)
            gradients.append(torch.autograd.grad(pictures.log_mse - pictures.ssim, given)[0])
    for key, value in found[0].items():
        assert found[1][key] == pytest.approx(value, rel=0.01), key
    assert (gradients[1] - gradients[0]).norm() < 0.03 * gradients[0].norm()
