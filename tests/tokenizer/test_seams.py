"""Every resampler with every quantiser, every decoder, with and without a vocabulary: train, save, load, decode."""

import itertools

import pytest
import torch

from v2flow_cli.errors import ModelError
from v2flow_cli.recipe.schema import TokenizerLoss
from v2flow_cli.tokenizer import V2FlowConfig, V2FlowTokenizer
from v2flow_cli.tokenizer.quantizer import TokenQuantizer
from v2flow_cli.tokenizer.resampler import TokenResampler
from v2flow_cli.training.objectives.objective import Objective

LOSS = TokenizerLoss(flow=1.0, regression=1.0, commit=0.1, batch_entropy=0.0, guidance_dropout=0.3)
GRID = {"kind": "grid", "hidden_size": 16, "depth": [1, 1], "tokens_per_256px": 64}
REGISTERS = {
    "kind": "registers",
    "hidden_size": 16,
    "depth": 1,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "dropout": 0.0,
    "patch_size": 2,
    "max_tokens": 6,
    "places": "centre",
    "causal": True,
    "nested_dropout": "power_of_two",
}
EMA = {
    "codebook_size": 32,
    "code_size": 8,
    "distance": "cosine",
    "ema_decay": 0.99,
    "start_step": 1,
    "revive_after": 0.1,
    "usage_floor": 0.0,
}
FSQ = {"kind": "fsq", "levels": [5, 4, 3], "usage_floor": 0.0}
MASKED = {
    "context": {
        "hidden_size": 32,
        "encoder_depth": 1,
        "decoder_depth": 1,
        "num_heads": 2,
        "mlp_ratio": 2.0,
        "dropout": 0.0,
        "mask_ratio_min": 0.7,
        "mask_ratio_std": 0.25,
    },
    "flow": {"formulation": "rectified_flow", "hidden_size": 32, "depth": 1, "time_shift": 3.0, "repeats": 1},
}
WHOLE = {
    "context": None,
    "flow": {
        "kind": "transformer",
        "formulation": "rectified_flow",
        "hidden_size": 32,
        "token_depth": 1,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 2.0,
        "dropout": 0.0,
        "time_shift": 3.0,
        "repeats": 1,
    },
}
SAMPLING = {
    "num_mask_steps": 1,
    "num_flow_steps": 2,
    "solver": "euler",
    "guidance_scale": 1.5,
    "guidance_schedule": "constant",
    "noise_temperature": 1.0,
}
AUTOENCODER = {
    "class": "V2FlowAutoencoder",
    "latent_channels": 4,
    "encoder_width": 8,
    "encoder_depth": 1,
    "decoder_width": 8,
    "decoder_depth": 1,
}
WORDS = {
    "llm": "words",
    "generator": "tied",
    "logit_scale": 10.0,
    "temperature": 1.0,
    "gumbel_noise": 0.0,
    "gumbel_ramp_steps": 0,
    "top_k": 0,
}


def build(resampler=REGISTERS, quantizer=FSQ, decoder=WHOLE, words=False):
    """A tokenizer of 32 px images: 2 x 2 patches, 1 (grid) or 1 to 6 (registers) tokens."""
    torch.manual_seed(0)
    config = V2FlowConfig(
        image_size=32,
        patch_size=2,
        autoencoder=AUTOENCODER,
        vocab_shape=(40, 12) if words else (0, 0),
        vocabulary=WORDS | ({} if words else {"llm": "none"}),
        resampler=resampler,
        quantizer=quantizer,
        sampling=SAMPLING,
        **decoder,
    )
    model = V2FlowTokenizer(config)
    if words:
        model.vocabulary.set_table(torch.randn(40, 12) + 0.3)
    for parameter in model.parameters():  # what starts at zero would hide every input
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def images(count=2, side=32):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, side, side, generator=generator) * 2 - 1


@pytest.mark.parametrize(
    "resampler,quantizer,decoder,words",
    list(itertools.product((GRID, REGISTERS), (EMA, FSQ), (MASKED, WHOLE), (False, True))),
)
def test_every_combination_trains_two_steps_and_is_saved_and_loaded(resampler, quantizer, decoder, words, tmp_path):
    model = build(resampler, quantizer, decoder, words).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    gradients = set()
    for step in range(4):
        out = model(model.latents.encode(images(8, side=64)), step=step, noise_scale=0.0, loss=LOSS)
        (out.flow_loss + out.regression_loss + out.commit_loss).backward()
        gradients |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained - gradients == set()
    model.eval().save_pretrained(tmp_path)
    loaded = V2FlowTokenizer.from_pretrained(tmp_path)
    assert loaded.digest == model.digest
    ids = loaded.encode(images())
    assert torch.equal(ids, model.encode(images())) and ids.max() < model.config.codebook_size
    assert torch.equal(loaded.decode(ids, height=32, width=32), model.decode(ids, height=32, width=32))
    assert model.codebook.shape == (model.config.codebook_size, 12 if words else model.quantizer.embed(ids).shape[-1])
    assert loaded.flexible == (resampler is REGISTERS)


BOTH_DECODERS = pytest.mark.parametrize("decoder", [MASKED, WHOLE], ids=["masked", "whole"])


@BOTH_DECODERS
@pytest.mark.parametrize("words", [False, True])
def test_decoding_a_prefix_ignores_the_rest(decoder, words):
    model = build(decoder=decoder, words=words)
    ids = model.encode(images())
    assert ids.shape == (2, 6)
    for k in (1, 4, 6):
        assert torch.equal(model.encode(images(), num_tokens=k), ids[:, :k])
        short = model.decode(ids[:, :k], seeds=[3, 4])
        other = torch.cat([ids[:, :k], (ids[:, k:] + 1) % model.config.codebook_size], dim=1)
        assert torch.allclose(short, model.decode(other, lengths=[k, k], seeds=[3, 4]), atol=1e-5)
    mixed = model.decode(ids, lengths=[2, 5], seeds=[3, 4])
    assert torch.allclose(mixed[1:], model.decode(ids[1:, :5], seeds=[4]), atol=1e-5)
    assert not torch.equal(model.decode(ids[:1, :1]), model.decode(ids[:1, :2]))


@BOTH_DECODERS
def test_dropped_tokens_change_no_loss(decoder, monkeypatch):
    """A step on a CPU leaves the mixtures of dropped tokens out; those of kept tokens, and all gradients, stay."""
    model = build(quantizer=EMA | {"start_step": 0}, decoder=decoder, words=True)
    latents = model.latents.encode(images(8, side=64))
    sizes, mix = [], model.vocabulary.forward

    def counting(tokens, *args):
        sizes.append(tokens[..., 0].numel())
        return mix(tokens, *args)

    monkeypatch.setattr(model.vocabulary, "forward", counting)

    def losses():
        torch.manual_seed(2)
        out = model(latents, step=1, noise_scale=0.0, loss=LOSS)
        (out.flow_loss + out.regression_loss).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return out, gradients

    short, gradients = losses()
    monkeypatch.setattr(model, "_kept_tokens", lambda lengths: None)
    whole, expected = losses()
    kept = short.token_ids >= 0
    assert sizes == [int(kept.sum()), 48] and 8 <= sizes[0] < 48 and kept[:, 0].all()
    assert torch.equal(short.token_ids[kept], whole.token_ids[kept])
    assert torch.allclose(short.flow_loss, whole.flow_loss)
    assert torch.allclose(short.regression_loss, whole.regression_loss)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, atol=1e-5), name


def test_the_length_of_an_ordered_sequence_does_not_determine_the_size():
    model = build()
    assert model.flexible and model.max_tokens == model.num_tokens(32, 32) == model.num_tokens(64, 32) == 6
    ids = model.encode(images(side=64))
    assert model.decode(ids).shape == (2, 3, 32, 32)
    assert model.decode(ids, height=64, width=64).shape == (2, 3, 64, 64)


def test_lengths_that_a_tokenizer_does_not_have():
    flexible, fixed = build(), build(GRID)
    for count in (0, 7):
        with pytest.raises(ValueError, match="takes 1 to 6"):
            flexible.encode(images(), num_tokens=count)
    with pytest.raises(ValueError, match="7 tokens; this tokenizer takes 1 to 6"):
        flexible.decode(torch.zeros(1, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match="2 tokens, but 64 x 64 pixels take 4"):
        fixed.encode(images(side=64), num_tokens=2)
    whole = build({**REGISTERS, "nested_dropout": "none"})
    assert not whole.flexible
    with pytest.raises(ValueError, match="3 tokens, but 32 x 32 pixels take 6"):
        whole.decode(torch.zeros(1, 3, dtype=torch.int64))


@BOTH_DECODERS
def test_guidance_of_one_does_not_compute_the_dummy(decoder):
    model = build(decoder=decoder)
    ids = model.encode(images())
    (model.flow if decoder is WHOLE else model.context).dummy_token.data.fill_(float("nan"))
    for guidance in ("cfg", "apg"):
        assert torch.isfinite(model.decode(ids, guidance_scale=1.0, guidance=guidance)).all()
    assert not torch.isfinite(model.decode(ids, guidance_scale=2.0)).all()


@BOTH_DECODERS
@pytest.mark.parametrize(
    "change",
    [
        {"guidance": "apg"},
        {"guidance": "apg", "apg_threshold": 0.0, "apg_parallel": 1.0},
        {"guidance_scale": 1.0},
        {"num_flow_steps": 3},
        {"solver": "heun"},
        {"solver": "dpm++", "num_flow_steps": 3},
        {"noise_temperature": 0.5},
    ],
    ids=str,
)
def test_every_sampling_option_changes_the_image(decoder, change):
    model = build(decoder=decoder)
    ids = model.encode(images())
    assert not torch.equal(model.decode(ids), model.decode(ids, **change))


def test_the_flow_transformer_has_one_round():
    model = build()
    with pytest.raises(ModelError, match="4 rounds, but this tokenizer's flow transformer"):
        model.decode(model.encode(images()), num_mask_steps=4)


def test_one_step_of_the_flow_transformer_is_the_mean_whatever_the_noise():
    model = build()
    ids, settings = model.encode(images()), {"num_flow_steps": 1, "guidance_scale": 1.0}
    assert torch.equal(model.decode(ids, seeds=[1, 2], **settings), model.decode(ids, seeds=[3, 4], **settings))


def test_the_digest_ignores_sampling_and_covers_the_parts():
    first, second = build(), build()
    second.config.sampling = {**SAMPLING, "guidance": "apg", "guidance_scale": 4.0}
    assert first.digest == second.digest
    assert build({**REGISTERS, "causal": False}).digest != first.digest


@pytest.mark.parametrize("interface", [TokenQuantizer, TokenResampler, Objective])
def test_an_implementation_that_lacks_a_method_is_refused_when_it_is_built(interface):
    incomplete = type("Incomplete", (interface,), {})
    with pytest.raises(TypeError, match="abstract"):
        incomplete()
