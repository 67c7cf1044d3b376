"""The perceptual loss: distances in a network's features, and how the pictures that it judges are drawn."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import squeezenet1_1

from tests.tokenizer.test_seams import build
from v2flow_cli.errors import ModelError, RecipeError
from v2flow_cli.recipe import dump_recipe
from v2flow_cli.recipe.schema import TokenizerLoss
from v2flow_cli.store.network_weights import JudgeWeights, weights_url
from v2flow_cli.training import perceptual
from v2flow_cli.training.loop import train
from v2flow_cli.training.perceptual import BACKBONES, block_distances, load_features, load_perceptual
from v2flow_cli.training.plan import plan
from v2flow_cli.training.resume import check_same_recipe

from .conftest import quiet, recipe
from .test_objective import objective, terms


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """SqueezeNet 1.1 with random weights, under torchvision's names."""
    torch.manual_seed(7)
    file = tmp_path_factory.mktemp("features") / "features.safetensors"
    save_file(squeezenet1_1(weights=None).state_dict(), file)
    return file


def pictures(count=2, side=64, seed=1):
    torch.manual_seed(seed)
    return torch.rand(count, 3, side, side) * 2 - 1


def test_the_distance_is_that_of_unit_features_counted_by_hand():
    a = [
        torch.tensor([[[[3.0]], [[4.0]]]]),
        torch.tensor([[[[1.0, 2.0]]]]),
    ]  # channels 3 and 4; one channel, two places
    b = [torch.tensor([[[[4.0]], [[3.0]]]]), torch.tensor([[[[5.0, -2.0]]]])]
    # (0.6 - 0.8)^2 twice = 0.08; places 0 and (1 - -1)^2 = 4, of mean 2; the mean of both blocks
    assert block_distances(a, b).item() == pytest.approx((0.08 + 2) / 2, abs=1e-4)
    assert block_distances(a, a).item() == 0


def test_the_network_is_torchvisions_and_its_blocks_those_of_lpips(features):
    network = load_features(features)
    reference = squeezenet1_1(weights=None).eval()
    reference.load_state_dict(load_file(features))
    images = pictures()
    x = (images / 2 + 0.5 - torch.tensor(perceptual.MEAN)[:, None, None]) / torch.tensor(perceptual.STD)[:, None, None]
    assert torch.allclose(network.blocks(images)[-1], reference.features(x), atol=1e-5)
    lpips = pytest.importorskip("lpips")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False).net
    for number in range(1, 8):
        for name, layer in getattr(net, f"slice{number}").named_children():
            layer.load_state_dict(reference.features[int(name)].state_dict())
    for ours, theirs in zip(network.blocks(images), net(x), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert network.backbone.name == "squeezenet1_1" and network.pooled(images).shape == (2, 512)


def test_equal_pictures_are_at_distance_0_and_gradients_are_finite_on_flat_ones(features):
    network = load_features(features)
    a, b = pictures(), pictures(seed=2)
    assert network(a, a).abs().max() == 0 and (network(a, b) > 0).all()
    for level in (-1.0, 0.0):
        flat = torch.full((1, 3, 64, 64), level, requires_grad=True)
        network(flat, a[:1]).sum().backward()
        assert flat.grad.isfinite().all()
    assert not any(p.requires_grad for p in network.parameters())


def test_autocast_does_not_reach_it(features):
    network = load_features(features)
    a, b = pictures(), pictures(seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = network(a, b)
    assert inside.dtype == torch.float32 and torch.equal(inside, network(a, b))


def test_loading_draws_no_random_number(features):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_features(features)
    assert torch.equal(torch.rand(1), expected)


def test_bad_files_are_errors(features, tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        load_perceptual(str(tmp_path / "none.safetensors"))
    (tmp_path / "damaged").write_bytes(features.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        load_features(tmp_path / "damaged")
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "part")
    with pytest.raises(ModelError, match=r"part: 1 weights with other .*expected the features of squeezenet1_1, vgg16"):
        load_features(tmp_path / "part")


def test_lpips_is_the_package_with_its_backbone(tmp_path, monkeypatch):
    file = tmp_path / weights_url("squeeze").rsplit("/", 1)[-1]
    torch.save(squeezenet1_1(weights=None).state_dict(), file)
    monkeypatch.setattr(JudgeWeights, "find", lambda self, name: file)
    monkeypatch.setattr(perceptual, "LPIPS_NET", "squeeze")
    network = load_perceptual("lpips")
    a = pictures().requires_grad_()
    network(a, pictures(seed=2)).sum().backward()
    assert a.grad.abs().sum() > 0 and network(a, a).abs().max() < 1e-6

    def missing(self, name):
        raise ModelError("LPIPS (squeeze): its weights are not at X. Use --download.")

    monkeypatch.setattr(JudgeWeights, "find", missing)
    with pytest.raises(ModelError, match=r"loss\.features is lpips.*not at X\. Fetch them once with .v2flow bench"):
        load_perceptual("lpips")


ALONE = ("loss.flow=0", "loss.regression=0", "loss.commit=0", "loss.batch_entropy=0", "loss.guidance_dropout=0")
WHOLE = ("context.mask_ratio_min=1.0", "vocabulary.gumbel_noise=0")


def test_the_loss_is_its_weight_times_the_distance_of_what_is_drawn(world, tmp_path, features):
    settings = (*ALONE, *WHOLE, "loss.perceptual=2.0", f"loss.features={features}", "loss.pixel_share=0.5")
    made = objective(world, tmp_path, *settings)
    images, out = terms(made)
    torch.manual_seed(0)
    again = objective(world, tmp_path, *settings)
    torch.manual_seed(0)
    model = again.model
    found = model(model.latents.encode(images), step=3, noise_scale=0.0, loss=made.recipe.loss)
    distance = load_features(features)(model.latents.draw(found.latents[2:]), images[2:]).mean()
    assert out["perceptual_loss"].item() == pytest.approx(distance.item(), rel=1e-4)
    assert out["loss"].item() == pytest.approx(2 * distance.item(), rel=1e-4)
    out["loss"].backward()
    assert made.model.flow.regress.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in made.model.latents.parameters())


def test_the_network_is_no_part_of_checkpoints_and_optimizers(world, tmp_path, features):
    plain = objective(world, tmp_path)
    made = objective(world, tmp_path, "loss.perceptual=1.0", f"loss.features={features}")
    assert set(made.state_dict()) == set(plain.state_dict())
    assert len(list(made.parameters())) == len(list(plain.parameters()))


SHARP = ("loss.pictures=sampling", "sampling.num_flow_steps=3", "sampling.noise_temperature=0.7")
SHARP += ("sampling.guidance_scale=1.0", "sampling.num_mask_steps=1", "flow.share=0.5")


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm++"])
def test_pictures_of_sampling_are_what_decode_draws(world, tmp_path, features, solver):
    """From the same noise, with all patches hidden, the pictures in training are those of ``decode``."""
    more = (*ALONE, *WHOLE, *SHARP, "loss.pixels=1.0", "loss.pixel_share=0.5", f"sampling.solver={solver}")
    made = objective(world, tmp_path, *more)
    model = made.model
    for layer in (model.flow.modulate_context, model.flow.modulate_time, model.flow.out):
        torch.nn.init.normal_(layer.weight, std=0.1)
    made.eval()
    images = pictures(4)
    noises = []
    real = torch.randn_like

    def record(x, **kwargs):
        noises.append(real(x, **kwargs))
        return noises[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", record)
        patch.setattr("v2flow_cli.tokenizer.decoder_masked.random_orders", lambda b, n, d: torch.arange(n).expand(b, n))
        out = model(model.latents.encode(images), step=3, noise_scale=0.0, loss=made.recipe.loss)
    noise = next(n for n in noises if len(n) == 2)  # of the two images that are drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "_seeded_noise", lambda seeds, positions: noise[list(seeds)])
        patch.setattr(model.latents, "decode", lambda latents, pixel_decoder: latents)
        decoded = model.decode(out.token_ids[2:], height=64, width=64, seeds=[0, 1])
    assert torch.allclose(out.latents[2:], decoded, atol=1e-4)
    torch.manual_seed(0)
    _, trained = terms(made.train())
    trained["loss"].backward()
    assert model.flow.out.weight.grad.abs().sum() > 0


def test_the_default_pictures_use_no_noise(world, tmp_path):
    """Recipes from before this key compute what they computed: one step from zeros."""
    made = objective(world, tmp_path, *WHOLE, "loss.pixels=1.0", "sampling.noise_temperature=0.7", "flow.share=0.5")
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "v2flow_cli.tokenizer.flow.solve", lambda predict, noise, *rest: calls.append((noise, *rest)) or noise
        )
        terms(made)
    [(noise, _, steps, _)] = calls
    assert noise.abs().max() == 0 and steps == 1


def test_a_flow_transformer_draws_by_sampling_too():
    torch.manual_seed(0)
    model = build()
    plain = TokenizerLoss(flow=1.0, regression=1.0, commit=0.1, batch_entropy=0.0, guidance_dropout=0.0)
    drawn = dataclasses.replace(plain, perceptual=1.0, pictures="sampling", pixel_share=0.5)
    model.config.sampling = {**model.config.sampling, "num_flow_steps": 3, "noise_temperature": 1.0, "solver": "euler"}
    for layer in (model.flow.modulate, model.flow.out):
        torch.nn.init.normal_(layer.weight, std=0.1)
    latents = torch.randn(4, model.latents.channels, 8, 8)

    def predicted(loss):
        torch.manual_seed(1)
        return model(latents, step=0, noise_scale=0.0, loss=loss).latents

    mean, sampled = predicted(plain), predicted(drawn)
    assert torch.allclose(mean[:2], sampled[:2], atol=1e-5) and not torch.allclose(mean[2:], sampled[2:], atol=1e-3)
    sampled[2:].sum().backward()
    assert model.flow.out.weight.grad.abs().sum() > 0


def test_a_training_with_the_perceptual_loss(world, tmp_path, features):
    first = tmp_path / "first"
    train(recipe(world, "tokenizer", first, "train.steps=2", "flow.share=0.5"), resume=False, log=quiet)
    settings = (f"init_from={first}", "freeze_tokens=true", "train.steps=2", "train.log_every=1", *SHARP)
    settings += ("loss.perceptual=1.0", f"loss.features={features}", "loss.pixel_share=0.5")
    made = train(recipe(world, "tokenizer", tmp_path / "sharp", *settings), resume=False, log=quiet)
    lines = [json.loads(line) for line in (made.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["train/perceptual_loss"] > 0 for line in lines)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("loss.perceptual=1.0",), "loss.features is empty"),
        (("loss.perceptual=1.0", "loss.features=x", "loss.pixel_share=0"), "loss.pixel_share is 0"),
        (("loss.pixels=1.0", "loss.pictures=sampling", "flow.share=0"), "flow.share is 0"),
        (("loss.pixels=1.0", "loss.pictures=sampling", "sampling.guidance_scale=2"), "sampling.guidance_scale is 2"),
        (("loss.pixels=1.0", "loss.pictures=sampling", "sampling.num_mask_steps=4"), "sampling.num_mask_steps is 4"),
    ],
)
def test_settings_that_do_not_fit_are_refused(world, tmp_path, settings, message):
    with pytest.raises(RecipeError, match=message):
        recipe(world, "tokenizer", tmp_path, *settings)


def test_a_dry_run_reports_a_missing_network_and_counts_its_memory(world, tmp_path, features):
    def planned(file):
        return plan(recipe(world, "tokenizer", tmp_path, "loss.perceptual=1.0", f"loss.features={file}"))

    there, missing = planned(features), planned(tmp_path / "none")
    assert "missing" not in there and "no such file" in missing["missing"][0]
    assert there["one_image_bytes"] > missing["one_image_bytes"]


def test_a_run_from_before_the_new_keys_resumes(world, tmp_path):
    made = recipe(world, "tokenizer", tmp_path)
    text = dump_recipe(made)
    old = "".join(
        f"{line}\n" for line in text.splitlines() if line.split(":")[0].strip() not in ("pictures", "features")
    )
    assert old != text
    check_same_recipe(tmp_path, old, text)
    with pytest.raises(ModelError, match="pixel_share"):
        check_same_recipe(tmp_path, old, dump_recipe(recipe(world, "tokenizer", tmp_path, "loss.pixel_share=0.5")))


def test_a_resumed_run_may_refine_in_other_steps(world, tmp_path):
    old, new = (dump_recipe(recipe(world, "tokenizer", tmp_path, f"refine_steps={steps}")) for steps in (0, 20))
    check_same_recipe(tmp_path, old, new)


@pytest.mark.parametrize("backbone", BACKBONES[1:], ids=lambda b: b.name)
def test_other_backbones_are_known_by_their_shapes(tmp_path, backbone):
    with torch.device("meta"):  # drawing VGG16's classifier would take seconds
        shapes = {name: weight.shape for name, weight in backbone.features().state_dict().items()}
    torch.manual_seed(0)
    weights = {f"features.{name}": 0.05 * torch.randn(shape) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "net.safetensors")
    network = load_features(tmp_path / "net.safetensors")
    assert network.backbone == backbone
    a, b = pictures(1), pictures(1, seed=2)
    assert network(a, a).item() == 0 and network(a, b).item() > 0
    assert len(network.blocks(a)) == len(backbone.blocks)
    small = pictures(1, side=backbone.min_size - 3)
    assert network.pooled(small).isfinite().all()


def test_the_smallest_pictures_fill_every_block():
    for backbone in BACKBONES:
        with torch.device("meta"):
            network = perceptual.FeatureNetwork(backbone)
            shapes = [block.shape for block in network.blocks(torch.zeros(1, 3, 5, 5))]
        assert all(min(shape[-2:]) >= 1 for shape in shapes)
