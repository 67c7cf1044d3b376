import pytest
import torch

from v2flow_cli.recipe.schema import Resampler
from v2flow_cli.tokenizer.resampler_grid import GridResampler


@pytest.mark.parametrize("pixels_per_latent", [1, 8, 16, 32])
@pytest.mark.parametrize("tokens", [64, 128, 256])
def test_token_counts_of_every_autoencoder_at_256_and_512(tokens, pixels_per_latent):
    made = GridResampler(Resampler(16, (0, 1), tokens), 4, pixels_per_latent)
    for height, width in ((256, 256), (512, 512), (256, 512)):
        latents = torch.randn(1, 4, height // pixels_per_latent, width // pixels_per_latent)
        expected = tokens * (height * width) // 256**2
        assert made(latents).shape == (1, expected, 16)
        rows, columns = made.token_grid(height, width)
        assert rows * columns == expected


def test_coarse_latents_split_into_the_tokens_of_their_own_cell():
    made = GridResampler(Resampler(16, (0, 0), 256), 4, 32)
    torch.nn.init.zeros_(made.stem.weight)
    made.stem.weight.data[:, :, 1, 1] = torch.randn(16, 4)  # no neighbours: each latent speaks for its own cell
    latents = torch.randn(1, 4, 8, 8)
    changed = latents.clone()
    changed[..., 2, 5] += 1
    moved = ~torch.isclose(made(latents), made(changed)).all(-1)[0].view(16, 16)
    assert sorted(moved.nonzero().tolist()) == [[4, 10], [4, 11], [5, 10], [5, 11]]


def test_grids_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="10 x 10 latents do not divide into 8 x 8 tokens at 256 px"):
        GridResampler(Resampler(16, (0, 0), 64), 4, 24)
