"""Crops and sizes: squares, and the nearest size on the grid of a picture that keeps its shape."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from v2flow_cli.tokenizer.preprocess import center_crop_box, fitted_size, image_to_tensor


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((256, 256), (256, 256)),
        ((4000, 4000), (256, 256)),
        ((600, 400), (208, 320)),  # 3:2 is 209.0 x 313.5
        ((400, 600), (320, 208)),
        ((1920, 1080), (192, 336)),
        ((1000, 1), (128, 512)),  # 4:1 is the limit
        ((1, 1000), (512, 128)),
    ],
)
def test_sizes_by_hand(size, fitted):
    assert fitted_size(*size, 256, 16) == fitted


def test_fitted_sizes_are_near_in_area_and_shape_and_turn_with_the_picture():
    rng = np.random.default_rng(0)
    for _ in range(300):
        width, height = rng.integers(100, 3000, 2).tolist()
        multiple = int(rng.choice([8, 16, 32]))
        high, wide = fitted_size(width, height, 256, multiple)
        assert high % multiple == wide % multiple == 0
        assert fitted_size(height, width, 256, multiple) == (wide, high)
        aspect = min(4.0, max(0.25, width / height))
        # Each side is at most one step of the grid away from what no grid would give.
        assert abs(high - 256 / math.sqrt(aspect)) < multiple and abs(wide - 256 * math.sqrt(aspect)) < multiple


def test_boxes_are_the_largest_and_centred():
    assert center_crop_box(600, 400) == (100, 0, 500, 400)
    assert center_crop_box(400, 600, 2.0) == (0, 200, 400, 400)
    assert center_crop_box(600, 400, 3.0) == (0, 100, 600, 300)
    assert center_crop_box(1, 1000, 4.0) == (0, 499, 1, 500)


def test_an_image_that_fits_is_unchanged_and_exif_rotation_comes_first():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert torch.equal(image_to_tensor(image, (32, 48)), torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)
    turned, exif = image.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # a quarter turn undoes it
    turned.info["exif"] = exif.tobytes()
    assert torch.equal(image_to_tensor(turned, (32, 48)), image_to_tensor(image, (32, 48)))
