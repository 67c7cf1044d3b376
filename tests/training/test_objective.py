"""The losses of a tokenizer beside the flow's (pixels, SSIM), and training of the decoder alone."""

import math
from dataclasses import replace

import pytest
import torch

from v2flow_cli.errors import ModelError, RecipeError
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.training.loop import train
from v2flow_cli.training.objectives.tokenizer import TokenizerObjective

from .conftest import quiet, recipe


def objective(world, tmp_path, *more):
    torch.manual_seed(0)
    made = TokenizerObjective(recipe(world, "tokenizer", tmp_path / "run", *more))
    return made.train()


def terms(made, seed=0, side=64):
    torch.manual_seed(seed)
    images = torch.rand(4, 3, side, side) * 2 - 1
    torch.manual_seed(seed)
    return images, made(images, step=3)


def test_pixel_loss_is_the_psnr_of_what_the_decoder_regresses(world, tmp_path):
    """Mask ratio 1 and no dummy: the regression predicts all patches, and its PSNR is computed by hand."""
    settings = ("context.mask_ratio_min=1.0", "loss.guidance_dropout=0.0", "loss.pixels=0.5", "loss.pixel_share=0.5")
    settings = ("vocabulary.gumbel_noise=0", *settings)
    made = objective(world, tmp_path, *settings)
    images, out = terms(made)
    torch.manual_seed(0)
    model = objective(world, tmp_path, *settings).model  # the same again: a pass moves running statistics
    torch.manual_seed(0)
    found = model(model.latents.encode(images), step=3, noise_scale=0.0, loss=made.recipe.loss)
    drawn = model.latents.draw(found.latents[2:])
    error = (drawn - images[2:]).square().mean((1, 2, 3)) / 4
    assert out["psnr_db"].item() == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-4)
    plain = objective(world, tmp_path, *settings[:3])
    _, without = terms(plain)
    assert "psnr_db" not in without
    assert (out["loss"] - without["loss"]).item() == pytest.approx(0.5 * error.log().mean().item(), abs=1e-4)
    assert math.isclose(out["regression_loss"].item(), without["regression_loss"].item(), rel_tol=1e-5)


def test_pixel_loss_reaches_the_encoder_through_the_frozen_autoencoder(world, tmp_path):
    zero = ("loss.flow=0", "loss.regression=0", "loss.commit=0", "loss.batch_entropy=0", "flow.share=0")
    made = objective(world, tmp_path, *zero, "loss.ssim=1.0", "context.mask_ratio_min=1.0", "loss.guidance_dropout=0")
    _, out = terms(made)
    out["loss"].backward()
    assert made.model.resampler.stem.weight.grad.abs().sum() > 0
    assert made.model.flow.regress.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in made.model.latents.parameters())
    assert out["loss"].item() == pytest.approx(1 - out["ssim"].item(), abs=1e-5)


def test_a_decoder_trained_further_reads_the_same_tokens(world, tmp_path):
    first = train(recipe(world, "tokenizer", tmp_path / "first", "train.steps=3"), resume=False, log=quiet).folder
    on = recipe(world, "tokenizer", tmp_path / "on", "train.steps=3", f"init_from={first}", "freeze_tokens=true")
    second = train(on, resume=False, log=quiet).folder
    before, after = V2FlowTokenizer.from_pretrained(first), V2FlowTokenizer.from_pretrained(second)
    assert before.token_digest == after.token_digest and before.digest != after.digest
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    ids = before.encode(images)
    assert torch.equal(ids, after.encode(images))
    assert not torch.equal(before.decode(ids), after.decode(ids))
    moved = {n.split(".")[0] for n, w in before.state_dict().items() if not torch.equal(w, after.state_dict()[n])}
    assert moved == {"context", "flow"}


def test_weights_that_determine_ids_are_not_rounded(world, tmp_path):
    made = objective(world, tmp_path, "train.save_dtype=bf16")
    images, _ = terms(made)
    made.eval()
    before, ids = {k: v.clone() for k, v in made.model.state_dict().items()}, made.model.encode(images)
    made.export(tmp_path / "model")
    after = V2FlowTokenizer.from_pretrained(tmp_path / "model")
    changed = {k for k, v in after.state_dict().items() if not torch.equal(v, before[k])}
    assert {"latents", "context", "flow"} < {name.split(".")[0] for name in changed}
    exact = ("resampler.", "vocabulary.", "quantizer.mean", "quantizer.std")
    assert "quantizer.codebook" in changed and not any(name.startswith(exact) for name in changed)
    assert (after.encode(images) == ids).float().mean() > 0.9


def test_a_frozen_encoder_keeps_its_settings(world, tmp_path):
    first = train(recipe(world, "tokenizer", tmp_path / "first", "train.steps=1"), resume=False, log=quiet).folder
    other = recipe(
        world, "tokenizer", tmp_path / "on", f"init_from={first}", "freeze_tokens=true", "quantizer.ema_decay=0.5"
    )
    with pytest.raises(ModelError, match=r"quantizer.ema_decay is .* but the recipe says 0.5, and freeze_tokens"):
        TokenizerObjective(other)
    TokenizerObjective(replace(other, freeze_tokens=False))  # trained on, it may change


REGISTERS = (
    "{kind: registers, hidden_size: 32, depth: 1, num_heads: 2, mlp_ratio: 2.0, dropout: 0.0, patch_size: 2, "
    "max_tokens: 16, places: grid, causal: true, nested_dropout: power_of_two"
)


def test_registers_start_as_a_trained_grid(world, tmp_path):
    first = train(recipe(world, "tokenizer", tmp_path / "first", "train.steps=3"), resume=False, log=quiet).folder
    grid, images = V2FlowTokenizer.from_pretrained(first), torch.rand(2, 3, 64, 64) * 2 - 1
    start = (f"init_from={first}", f"resampler={REGISTERS}, stem: [1, 1]}}")
    made = objective(world, tmp_path, *start).eval().model
    cells = made.resampler.layout(64, 64, 4, 4, torch.device("cpu"))[1]
    assert torch.equal(made.encode(images)[:, cells], grid.encode(images))  # the grid's tokens, in another order
    weights = made.state_dict()
    decoder = {name: weight for name, weight in grid.state_dict().items() if name.startswith(("context.", "flow."))}
    assert decoder and all(torch.equal(weight, weights[name]) for name, weight in decoder.items())
    assert made.flexible and made.decode(made.encode(images, 3)).shape[0] == 2
    plain = objective(world, tmp_path, f"init_from={first}", f"resampler={REGISTERS}}}").model
    assert torch.equal(plain.context.embed_patch.weight, grid.context.embed_patch.weight)
    assert "resampler.grid.stem.weight" not in plain.state_dict()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (", stem: [1, 2]}", ModelError, r"resampler.stem is \(1, 1\), but the recipe says \(1, 2\)"),
        (", stem: [1, 1]} freeze_tokens=true", ModelError, "freeze_tokens cannot keep them"),
        (", stem: [1]}", RecipeError, r"resampler.stem is \[1\]; expected two numbers"),
        (", places: grid, max_tokens: 12}", RecipeError, "needs a square number"),
    ],
)
def test_registers_that_cannot_start_from_a_grid(world, tmp_path, settings, error, message):
    first = train(recipe(world, "tokenizer", tmp_path / "first", "train.steps=1"), resume=False, log=quiet).folder
    resampler, *more = (f"resampler={REGISTERS}{settings}").split(" freeze")
    with pytest.raises(error, match=message):
        objective(world, tmp_path, f"init_from={first}", resampler, *(f"freeze{part}" for part in more))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("freeze_tokens=true", "init_from names no tokenizer"),
        ("loss.pixels=1.0 loss.pixel_share=0", "loss.pixel_share is 0"),
        ("data.resident_px=32", "expected at least data.crop_size 64"),
    ],
)
def test_settings_that_contradict_each_other(world, tmp_path, override, message):
    with pytest.raises(RecipeError, match=message):
        recipe(world, "tokenizer", tmp_path / "run", *override.split())
