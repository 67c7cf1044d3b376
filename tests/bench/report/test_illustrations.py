"""Error maps, token colours, data URIs."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from v2flow_cli.bench.report import illustrations


def test_error_map_runs_from_dark_to_bright() -> None:
    black = np.zeros((1, 3, 3), dtype=np.uint8)
    other = black.copy()
    other[0, 1], other[0, 2] = 32, 200
    none, half, full = illustrations.error_map(black, other)[0].astype(int)
    assert none.tolist() == [8, 8, 16] and half.tolist() == [186, 54, 85] and full.tolist() == [252, 248, 190]


@pytest.mark.parametrize(("tokens", "shape"), [(256, (16, 16)), (128, (8, 16)), (64, (8, 8)), (7, (1, 7)), (1, (1, 1))])
def test_token_grid_shape(tokens: int, shape: tuple[int, int]) -> None:
    assert illustrations.token_grid_shape(tokens) == shape


def test_near_codes_get_near_colours() -> None:
    torch.manual_seed(3)
    centres = 10 * torch.randn(8, 1, 12)
    codebook = (centres + 0.1 * torch.randn(8, 16, 12)).flatten(0, 1)
    state = torch.get_rng_state()
    colours = illustrations.token_colours(codebook)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(colours, illustrations.token_colours(codebook))
    assert colours.shape == (128, 3) and colours.dtype == np.uint8
    groups = colours.reshape(8, 16, 3).astype(float)
    within = groups.std(axis=1).mean()
    between = groups.mean(axis=1).std(axis=0).mean()
    assert between > 2 * within


def test_token_colours_of_a_narrow_codebook() -> None:
    assert illustrations.token_colours(torch.tensor([[0.0], [1.0]])).shape == (2, 3)


def test_data_uri_is_lossless() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    head, _, body = illustrations.data_uri(pixels).partition(",")
    assert head == "data:image/webp;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(body)))), pixels)
