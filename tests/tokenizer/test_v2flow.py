import dataclasses
import json

import pytest
import torch

from v2flow_cli.errors import ModelError
from v2flow_cli.recipe.schema import TokenizerLoss
from v2flow_cli.runtime.batch_invariant import on_single_threads
from v2flow_cli.tokenizer import V2FlowTokenizer

LOSS = TokenizerLoss(flow=1.0, regression=1.0, commit=0.1, batch_entropy=0.0, guidance_dropout=0.3)


def images(count=3, side=64):
    torch.manual_seed(1)
    return torch.rand(count, 3, side, side) * 2 - 1


def test_encode_is_deterministic_and_independent_of_the_batch(tiny_tokenizer):
    x = images()
    ids = tiny_tokenizer.encode(x)
    assert ids.shape == (3, 16) and ids.dtype == torch.int64
    assert torch.equal(ids, tiny_tokenizer.encode(x))
    assert torch.equal(ids, torch.cat([tiny_tokenizer.encode(image[None]) for image in x]))


def test_decode_shapes_seeds_and_batches(tiny_tokenizer):
    ids = tiny_tokenizer.encode(images())
    together = tiny_tokenizer.decode(ids, seeds=[3, 4, 5])
    assert together.shape == (3, 3, 64, 64) and together.abs().max() <= 1
    alone = tiny_tokenizer.decode(ids[1:2], seeds=[4])
    assert torch.equal(together[1:2], alone)
    assert not torch.allclose(alone, tiny_tokenizer.decode(ids[1:2], seeds=[9]), atol=1e-3)


def test_guidance_of_one_is_bit_for_bit_no_guidance(tiny_tokenizer):
    ids = tiny_tokenizer.encode(images(1))
    tiny_tokenizer.context.dummy_token.data.fill_(float("nan"))  # the dummy branch must not even be computed
    assert torch.isfinite(tiny_tokenizer.decode(ids, guidance_scale=1.0)).all()


@pytest.mark.parametrize(
    "change",
    [
        {"guidance_scale": 3.0},
        {"guidance_scale": 3.0, "guidance_schedule": "constant"},
        {"num_mask_steps": 1},
        {"num_mask_steps": 4},
        {"num_flow_steps": 1},
        {"num_flow_steps": 5},
        {"num_flow_steps": 3, "solver": "heun"},
        {"num_flow_steps": 3, "solver": "dpm++"},
        {"noise_temperature": 0.3},
    ],
)
def test_every_sampling_option_changes_the_image(tiny_tokenizer, change):
    ids = tiny_tokenizer.encode(images(1))
    assert not torch.equal(tiny_tokenizer.decode(ids, seeds=[0]), tiny_tokenizer.decode(ids, seeds=[0], **change))


def test_guidance_is_equation_7(tiny_tokenizer):
    ids = tiny_tokenizer.encode(images(1))
    latents = []
    tiny_tokenizer.latents.decode = lambda x, pixel_decoder: latents.append(x) or x
    settings = {"num_mask_steps": 1, "num_flow_steps": 1, "guidance_schedule": "constant", "seeds": [0]}
    for scale in (1.0, 0.0, 2.5):
        tiny_tokenizer.decode(ids, guidance_scale=scale, **settings)
    given, dummy, guided = latents
    assert torch.allclose(guided, 2.5 * given + (1 - 2.5) * dummy, atol=1e-4)


def test_non_square_images(tiny_tokenizer):
    x = torch.rand(1, 3, 32, 64) * 2 - 1
    ids = tiny_tokenizer.encode(x)
    assert ids.shape == (1, 8)
    assert tiny_tokenizer.decode(ids, height=32, width=64).shape == (1, 3, 32, 64)


def test_a_grid_has_one_length(tiny_tokenizer):
    assert not tiny_tokenizer.flexible
    assert tiny_tokenizer.max_tokens == tiny_tokenizer.num_tokens(32, 32) == 4


def test_sizes_that_do_not_fit_are_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="multiples of 16"):
        tiny_tokenizer.encode(torch.zeros(1, 3, 40, 40))
    with pytest.raises(ValueError, match="no square image has 5 tokens"):
        tiny_tokenizer.decode(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[0, 64\)"):
        tiny_tokenizer.decode(torch.full((1, 4), 64))


def test_training_pass_reaches_every_trainable_part(tiny_tokenizer):
    model, x, loss = tiny_tokenizer.train(), tiny_tokenizer.latents.encode(images(8)), 0
    model.config.sampling |= {"guidance_scale": 2.0}  # without guidance nothing would see the dummy D
    for _ in range(3):
        out = model(x, step=10, noise_scale=0.1, loss=LOSS)
        loss = loss + out.flow_loss + out.regression_loss + out.commit_loss
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []
    assert not any(p.requires_grad for p in model.latents.parameters())


def test_a_dropped_image_sees_no_token(tiny_tokenizer):
    model = tiny_tokenizer.train()
    torch.manual_seed(0)
    loss = TokenizerLoss(flow=1.0, regression=1.0, commit=0.0, batch_entropy=0.0, guidance_dropout=1.0)
    for scale, dropped in ((2.0, True), (1.0, False)):  # sampling without guidance never looks at D
        model.config.sampling |= {"guidance_scale": scale}
        model.zero_grad()
        out = model(model.latents.encode(images(2)), step=10, noise_scale=0.0, loss=loss)
        out.flow_loss.backward()
        assert (model.resampler.stem.weight.grad is None) == dropped
        assert (model.context.dummy_token.grad is None) == (not dropped)


def test_losses_in_pixels_see_what_one_step_without_noise_decodes(tiny_tokenizer):
    model, x = tiny_tokenizer, images(1)
    settings = dataclasses.replace(model.decoder.context_settings, mask_ratio_min=1.0)
    model.decoder.context_settings = settings  # every patch is hidden, as in one round
    loss = TokenizerLoss(1.0, 1.0, commit=0.0, batch_entropy=0.0, guidance_dropout=0.0, ssim=1.0)
    trained = model(model.latents.encode(x), step=10, noise_scale=0.0, loss=loss).latents
    decoded = []
    model.latents.decode = lambda latents, pixel_decoder: decoded.append(latents) or latents
    one_step = {"num_mask_steps": 1, "num_flow_steps": 1, "guidance_scale": 1.0, "noise_temperature": 0.0}
    model.decode(model.encode(x), **one_step)
    assert torch.allclose(trained, decoded[0], atol=1e-5)
    trained.square().sum().backward()
    assert model.flow.out.weight.grad.any()


def test_without_losses_in_pixels_the_flow_is_not_sampled(tiny_tokenizer):
    model = tiny_tokenizer
    out = model(model.latents.encode(images(2)), step=10, noise_scale=0.0, loss=LOSS)
    out.latents.square().sum().backward()
    assert model.flow.out.weight.grad is None and model.flow.regress.weight.grad.any()


def test_vectors_are_float32_under_autocast(tiny_tokenizer):
    """In bf16 the words' mixtures, which hardly differ, would be rounded to equal values."""
    seen = []
    tiny_tokenizer.vocabulary.register_forward_hook(lambda _, given, out: seen.extend([given[0], out.embeddings]))
    with torch.autocast("cpu", torch.bfloat16):
        tiny_tokenizer.encode(images(2))
        assert tiny_tokenizer.latents.encode(images(2)).dtype == torch.bfloat16  # the autoencoder is under it
    assert {tensor.dtype for tensor in seen} == {torch.float32}


def test_ids_do_not_depend_on_the_number_of_threads(tiny_tokenizer):
    threads = torch.get_num_threads()
    with torch.inference_mode():
        together = tiny_tokenizer.encode(images(5))
    assert torch.get_num_threads() == threads and together.shape[0] == 5
    try:
        torch.set_num_threads(1)
        assert torch.equal(tiny_tokenizer.encode(images(5)), together)
        torch.set_num_threads(3)
        assert torch.equal(torch.cat([tiny_tokenizer.encode(image) for image in images(5).split(1)]), together)
        assert torch.equal(tiny_tokenizer.encode(images(5)), together) and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_threads_use_the_callers_autocast_and_raise_in_the_caller(tiny_tokenizer):
    seen = []

    def look(image):
        seen.append((torch.get_num_threads(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()))
        if image.sum() > 2:
            raise ValueError("too much")
        return image

    threads = torch.get_num_threads()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.cat(on_single_threads(look, torch.ones(2, 1))), torch.ones(2, 1))
    with pytest.raises(ValueError, match="too much"):
        on_single_threads(look, torch.tensor([[1.0], [3.0]]))
    assert seen[:2] == [(1, True, True)] * 2 and seen[2] == (1, False, False)
    assert torch.get_num_threads() == threads


def test_folder_round_trip(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"config.json", "model.safetensors", "preprocessor_config.json"}
    loaded = V2FlowTokenizer.from_pretrained(tmp_path)
    assert loaded.digest == tiny_tokenizer.digest
    assert torch.equal(loaded.encode(images()), tiny_tokenizer.encode(images()))
    assert loaded.image_processor.size == tiny_tokenizer.config.image_size


def test_digest_changes_with_the_weights_and_not_with_the_sampling(tiny_tokenizer):
    before, of_tokens = tiny_tokenizer.digest, tiny_tokenizer.token_digest
    tiny_tokenizer.config.sampling["num_flow_steps"] = 9
    assert (tiny_tokenizer.digest, tiny_tokenizer.token_digest) == (before, of_tokens)
    with torch.no_grad():
        tiny_tokenizer.flow.regress.bias[0] += 1
    assert tiny_tokenizer.digest != before and tiny_tokenizer.token_digest == of_tokens  # a decoder trained further
    tiny_tokenizer.quantizer.codebook[0] += 1
    assert tiny_tokenizer.token_digest != of_tokens


@pytest.mark.parametrize("way", ["in place", "behind autograd's back", "loaded", "another settings section"])
def test_digests_follow_the_weights_however_they_change(tiny_tokenizer, way):
    before, table = tiny_tokenizer.token_digest, tiny_tokenizer.vocabulary.table
    if way == "in place":
        with torch.no_grad():
            table[0, 0] += 1
    elif way == "behind autograd's back":  # which counts no version of the tensor
        table.data[0, 0] += 1
    elif way == "loaded":
        weights = tiny_tokenizer.state_dict()
        tiny_tokenizer.load_state_dict(weights | {"vocabulary.table": table + 1})
    else:
        tiny_tokenizer.config.vocabulary["top_k"] = 3
    assert tiny_tokenizer.token_digest != before


def test_folders_without_a_model_are_refused(tmp_path, tiny_tokenizer_folder):
    with pytest.raises(ModelError, match="no model; expected a v2flow tokenizer"):
        V2FlowTokenizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="'llama'; expected a v2flow tokenizer"):
        V2FlowTokenizer.from_pretrained(tmp_path)


def test_loading_is_strict(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["flow"]["depth"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="weights do not fit"):
        V2FlowTokenizer.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ModelError, match="not a loadable"):
        V2FlowTokenizer.from_pretrained(tmp_path)
