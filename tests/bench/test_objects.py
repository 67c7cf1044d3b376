"""Objects found on their ground, and their colours."""

import numpy as np
import pytest
from PIL import Image

from tests.bench.drawings import TONES, scene, shape
from v2flow_cli.bench.colours import main_colour, name_pixels
from v2flow_cli.bench.objects import CANVAS, cut_out, find_objects, foreground, halves, whole


@pytest.mark.parametrize("ground", ["white", (20, 20, 30), (180, 220, 250)])
def test_foreground_of_a_plain_background(ground):
    picture = scene((shape("disc", "red"), 0.3, 0.6), ground=ground)
    alpha = np.asarray(shape("disc", "red"))[..., 3] > 128
    assert abs(foreground(picture).sum() - alpha.sum()) < 0.03 * alpha.sum()


def test_a_noisy_ramp_is_background_and_holes_are_filled():
    ramp = np.linspace(90, 230, 192)[:, None, None] * np.ones((1, 192, 3))
    noise = np.random.default_rng(0).normal(0, 5, ramp.shape)
    picture = (ramp + noise).clip(0, 255).astype(np.uint8)
    picture[60:120, 60:120] = (200, 20, 20)
    picture[80:100, 80:100] = ramp[80:100, 80:100].astype(np.uint8)  # as a white belly on white
    assert foreground(picture).sum() == pytest.approx(3600, rel=0.05)


def test_an_object_at_the_border_does_not_change_the_background():
    picture = np.full((100, 100, 3), 255, np.uint8)
    picture[40:, 30:70] = (30, 60, 200)
    assert foreground(picture).sum() == pytest.approx(60 * 40, rel=0.05)


def test_without_a_background_all_pixels_are_foreground():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    blank = np.full((64, 64, 3), 200, np.uint8)
    for picture in (noise, blank):
        assert foreground(picture).all()
        assert len(find_objects(picture)) == 1


def test_objects_are_sorted_by_size_and_small_fragments_are_ignored():
    small = shape("disc", "blue").resize((40, 40))
    picture = scene((shape("cross", "red"), 0.3, 0.3), (small, 0.8, 0.8), (small.resize((8, 8)), 0.9, 0.1))
    first, second = find_objects(picture)
    assert first.area > second.area
    assert first.centre == pytest.approx((0.3 * 192, 0.3 * 192), abs=2)
    assert second.centre == pytest.approx((0.8 * 192, 0.8 * 192), abs=2)
    whole_box = whole(picture).box
    assert whole_box[0] <= first.box[0] and whole_box[2] >= second.box[2]


def test_a_cut_out_does_not_depend_on_place_and_size():
    cuts = []
    for side, x, y, ground in ((96, 0.5, 0.5, "white"), (60, 0.3, 0.7, "white"), (80, 0.6, 0.4, (190, 220, 190))):
        cut = shape("cross", "red").resize((side, side), Image.Resampling.LANCZOS)
        picture = scene((cut, x, y), ground=ground)
        cuts.append(cut_out(picture, find_objects(picture)[0]).astype(int))
    assert cuts[0].shape == (CANVAS, CANVAS, 3)
    for cut in cuts[1:]:
        assert np.abs(cut - cuts[0]).mean() < 8


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((255, 255, 255), "white"),
        ((10, 10, 10), "black"),
        ((128, 128, 128), "grey"),
        ((150, 160, 175), "grey"),
        ((220, 20, 30), "red"),
        ((250, 150, 30), "orange"),
        ((120, 70, 30), "brown"),
        ((250, 220, 40), "yellow"),
        ((60, 160, 70), "green"),
        ((60, 190, 190), "turquoise"),
        ((40, 90, 210), "blue"),
        ((120, 40, 160), "purple"),
        ((250, 150, 190), "pink"),
        ((240, 220, 185), "beige"),
    ],
)
def test_colour_names_of_pixels(rgb, name):
    assert name_pixels(np.array([rgb], np.uint8)).tolist() == [name]


def test_the_main_colour_is_that_of_most_pixels_and_outlines_count_less():
    for name, tone in TONES.items():
        assert main_colour(np.array([tone] * 5 + [(0, 0, 0)] * 4, np.uint8)) == name
        assert main_colour(np.array([tone] * 6 + [(0, 0, 0)] * 9, np.uint8)) == name
    assert main_colour(np.array([TONES["red"]] + [(0, 0, 0)] * 9, np.uint8)) == "black"


@pytest.mark.parametrize("across", [True, False])
def test_touching_objects_are_split_where_they_are_thinnest(across):
    places = ((0.27, 0.5), (0.75, 0.5)) if across else ((0.5, 0.27), (0.5, 0.75))
    picture = scene((shape("disc", "red"), *places[0]), (shape("disc", "blue"), *places[1])).copy()
    picture[92:100, 60:130] = picture[60:130, 92:100] = (205, 30, 30)  # a bridge
    assert len(find_objects(picture)) == 1
    first, second = halves(picture, across)
    assert first.centre == pytest.approx((places[0][0] * 192, places[0][1] * 192), abs=14)
    assert second.centre == pytest.approx((places[1][0] * 192, places[1][1] * 192), abs=14)
    assert first.area + second.area == whole(picture).area


def test_a_thousand_equal_objects_are_a_thousand():
    picture = np.full((256, 256, 3), 255, np.uint8)
    for row in range(8, 240, 7):
        for column in range(8, 240, 7):
            picture[row : row + 3, column : column + 3] = 0
    assert len(find_objects(picture)) == 34**2
