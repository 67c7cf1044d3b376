"""One tokenizer with several lengths: 64, 128 and 256 tokens of an image from one codebook and decoder."""

import pytest
import torch

from tests.tokenizer.test_seams import EMA, GRID, LOSS, MASKED
from v2flow_cli.tokenizer import V2FlowConfig, V2FlowTokenizer
from v2flow_cli.tokenizer.context import grid_part_index, grid_token_index

LENGTHS = (256, 64, 128)
SHARES = (0.4, 0.3)  # of the steps, of the second and the third


def build(others: tuple[int, ...] = LENGTHS[1:]) -> V2FlowTokenizer:
    torch.manual_seed(0)
    config = V2FlowConfig(
        image_size=64,
        patch_size=2,
        autoencoder={
            "class": "V2FlowAutoencoder",
            "latent_channels": 4,
            "encoder_width": 8,
            "encoder_depth": 1,
            "decoder_width": 8,
            "decoder_depth": 1,
        },
        vocabulary={
            "llm": "none",
            "generator": "tied",
            "logit_scale": 1.0,
            "temperature": 1.0,
            "gumbel_noise": 0.0,
            "gumbel_ramp_steps": 0,
            "top_k": 0,
        },
        resampler={
            **GRID,
            "tokens_per_256px": 256,
            "other_tokens_per_256px": list(others),
            "other_shares": SHARES[: len(others)],
        },
        quantizer=EMA,
        sampling={
            "num_mask_steps": 2,
            "num_flow_steps": 1,
            "solver": "euler",
            "guidance_scale": 2.0,
            "guidance_schedule": "constant",
            "noise_temperature": 1.0,
        },
        **MASKED,
    )
    return V2FlowTokenizer(config).eval()


def test_every_length_encodes_and_decodes_to_the_size_of_the_image():
    tokenizer, images = build(), torch.rand(2, 3, 64, 64) * 2 - 1
    assert tokenizer.lengths(64, 64) == (16, 4, 8)
    for length in (16, 4, 8):
        token_ids = tokenizer.encode(images, length)
        assert token_ids.shape == (2, length)
        assert tokenizer.grid_of(length) == (64, 64)
        assert tokenizer.decode(token_ids).shape == images.shape
    assert tokenizer.encode(images).shape == (2, 16)


def test_a_size_that_a_coarse_grid_does_not_divide_has_the_finer_lengths_alone():
    tokenizer = build()
    assert tokenizer.lengths(48, 64) == (12,)  # 64 tokens need multiples of 32 pixels
    with pytest.raises(ValueError, match="48 x 64 pixels take 12"):
        tokenizer.encode(torch.zeros(1, 3, 48, 64), 4)
    with pytest.raises(ValueError, match="take 16 or 4 or 8"):
        tokenizer.check_length(5, 64, 64)


def test_training_alternates_lengths_and_each_one_trains_its_weights():
    tokenizer = build().train()
    latents = tokenizer.latents.encode(torch.rand(4, 3, 64, 64) * 2 - 1)
    seen = set()
    for step in range(12):
        out = tokenizer(latents, step=step, noise_scale=0.0, loss=LOSS)
        (out.regression_loss + out.flow_loss + out.commit_loss).backward()
        seen.add(out.token_ids.shape[1])
    assert seen == {16, 4, 8}
    for name, parameter in tokenizer.named_parameters():
        if name.startswith(("context.split", "context.rate_embedding", "resampler.other_downsample")):
            assert parameter.grad is not None and parameter.grad.any(), name


def test_the_first_length_is_that_of_a_tokenizer_without_others():
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    several, one = build(), build(others=())
    one.load_state_dict(several.state_dict(), strict=False)
    assert torch.equal(several.encode(images), one.encode(images))
    ids = one.encode(images)
    assert torch.equal(several.decode(ids), one.decode(ids))


def test_the_patches_of_a_token_are_numbered_within_it():
    cells = grid_token_index(2, 2, 4, 4, torch.device("cpu"))
    parts = grid_part_index(2, 2, 4, 4, torch.device("cpu"))
    assert len({*zip(cells.tolist(), parts.tolist())}) == 16
    assert parts.view(4, 4)[0].tolist() == [0, 1, 0, 1]
    assert grid_part_index(2, 4, 4, 4, torch.device("cpu")).unique().tolist() == [0, 1]
