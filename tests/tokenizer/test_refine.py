"""Refined ids: never worse for the decoder, independent of the batch, and of any combination of parts."""

import itertools
import json

import pytest
import torch

from tests.tokenizer.test_seams import EMA, FSQ, GRID, MASKED, REGISTERS, WHOLE, build, images
from v2flow_cli.errors import ModelError
from v2flow_cli.runtime.device import inference
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.preprocess import image_to_tensor, psnr, to_uint8
from v2flow_cli.tokenizer.refine import refine_ids


def latent_error(model, photos, ids):
    """Mean squared error of each image's latents in one step without noise, by another way than the refinement's."""
    seen = []

    class Stop(Exception):
        pass

    def catch(latents, *_):
        seen.append(latents)
        raise Stop

    decode, model.latents.decode = model.latents.decode, catch
    one_step = dict(num_mask_steps=1, num_flow_steps=1, guidance_scale=1.0, noise_temperature=0.0)
    try:
        for row in ids:
            with pytest.raises(Stop):
                model.decode(row[None], height=photos.shape[2], width=photos.shape[3], **one_step)
    finally:
        model.latents.decode = decode
    with torch.no_grad():
        target = model.latents.encode(photos)
    return (torch.cat(seen) - target).square().mean((1, 2, 3))


@pytest.mark.parametrize(
    "resampler,quantizer,decoder,words",
    list(itertools.product((GRID, REGISTERS), (EMA, FSQ), (MASKED, WHOLE), (False, True))),
)
def test_refined_ids_are_at_least_as_good(resampler, quantizer, decoder, words):
    model, photos = build(resampler, quantizer, decoder, words), images(4, side=64)
    length = 3 if model.flexible else None
    with inference(model.device, torch.float32):  # as the commands call it
        plain, refined = model.encode(photos, length), model.encode(photos, length, refine_steps=8)
    assert refined.shape == plain.shape and refined.dtype == torch.int64
    assert 0 <= int(refined.min()) <= int(refined.max()) < model.config.codebook_size
    before, after = latent_error(model, photos, plain), latent_error(model, photos, refined)
    assert (after <= before + 1e-6).all()
    assert after.mean() < before.mean() - 1e-6  # something was found
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model.encode(photos, length, refine_steps=8), refined)
    for i in range(4):  # on a CPU, whatever else is in the batch
        assert torch.equal(model.encode(photos[i : i + 1], length, refine_steps=8), refined[i : i + 1])


def test_without_steps_the_ids_are_those_of_the_encoder():
    model = build()
    vectors = torch.randn(2, 6, 3)
    errors = []

    def error(embeddings):
        errors.append(embeddings)
        return embeddings.square().sum((1, 2))

    assert torch.equal(refine_ids(vectors, model.quantizer, error, 0), model.quantizer(vectors).token_ids)
    assert len(errors) == 1
    with pytest.raises(ValueError, match="-1 steps to refine ids"):
        model.encode(images(), refine_steps=-1)


def test_the_config_has_the_steps_of_a_given_number_of_tokens():
    model, photos = build(), images()
    plain, refined = model.encode(photos), model.encode(photos, 3, refine_steps=4)
    model.config.refine_steps = 4
    assert torch.equal(model.encode(photos, 3), refined)
    assert torch.equal(model.encode(photos, 3, refine_steps=0), plain[:, :3])
    assert torch.equal(model.encode(photos), plain)  # every prefix of these can be decoded


@pytest.mark.parametrize("key,value", [("refine_steps", v) for v in (-1, "20", 2.5, None)] + [("image_size", "256")])
def test_a_config_with_something_else_than_a_number_is_refused(key, value, tmp_path):
    build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ModelError, match=f"{key} of the config is .*; expected a whole number from"):
        V2FlowTokenizer.from_pretrained(tmp_path)


def test_an_error_that_is_not_finite_keeps_the_ids_of_the_encoder():
    model = build()
    vectors = torch.randn(2, 6, 3)
    nothing = torch.tensor([1.0, torch.nan])[:, None, None]
    found = refine_ids(vectors, model.quantizer, lambda x: (x * nothing).square().sum((1, 2)), 5)
    assert torch.equal(found[1], model.quantizer(vectors).token_ids[1])
    assert not torch.equal(found[0], model.quantizer(vectors).token_ids[0])


def test_the_embedded_flexible_model_gains_with_few_tokens(sample_images):
    model = V2FlowTokenizer.from_pretrained("flexible")
    photos = torch.stack([image_to_tensor(image, 256) for image in sample_images[:2]])
    found = []
    for steps in (0, 4):
        ids = model.encode(photos, 16, refine_steps=steps)
        assert ids.shape == (2, 16)
        found.append(psnr(to_uint8(photos), to_uint8(model.decode(ids, height=256, width=256))))
    assert (found[1] > found[0]).all()
