"""The judge on drawings whose contents are known, with a network of random weights, which distinguishes shapes."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.bench.drawings import SHAPES, TONES, scene, shape, write_tar
from v2flow_cli.bench.features import ClipSpace, NetworkSpace, load_space
from v2flow_cli.bench.judge import Judge, real_pictures
from v2flow_cli.bench.prompts import KINDS, Thing, prompt_for
from v2flow_cli.bench.references import read_references
from v2flow_cli.errors import ModelError
from v2flow_cli.training.perceptual import FeatureNetwork


@pytest.fixture(scope="module")
def space():
    torch.manual_seed(0)
    return NetworkSpace(FeatureNetwork().eval().requires_grad_(False))


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return read_references([str(write_tar(tmp_path_factory.mktemp("drawings") / "a.tar"))])


@pytest.fixture(scope="module")
def judge(space, references):
    return Judge(space, references)


def right(judge, prompt, picture):
    [verdict] = judge.verdicts([(prompt, picture)])
    return verdict.right


def test_a_thing_is_recognised_at_any_place_and_size(judge):
    for name in SHAPES:
        picture = scene((shape(name, "green", lean=1).resize((70, 70)), 0.35, 0.6), ground=(230, 230, 250))
        for other in SHAPES:
            verdict = right(judge, prompt_for("object", [Thing(other)]), picture)
            assert verdict["noun"] == verdict["all"] == (other == name)


def test_thing_and_colour_must_both_be_right(judge):
    picture = scene((shape("disc", "blue"), 0.5, 0.5))
    assert right(judge, prompt_for("colour", [Thing("disc", "blue")]), picture) == {
        "noun": True,
        "noun_in_5": True,
        "colour": True,
        "all": True,
    }
    wrong = right(judge, prompt_for("colour", [Thing("disc", "red")]), picture)
    assert wrong["noun"] and not wrong["colour"] and not wrong["all"]
    assert not right(judge, prompt_for("colour", [Thing("bar", "blue")]), picture)["all"]


def test_things_are_counted(judge):
    small = shape("cross", "red").resize((50, 50))
    picture = scene((small, 0.2, 0.5), (small, 0.5, 0.4), (small, 0.8, 0.6))
    assert right(judge, prompt_for("count", [Thing("cross")], count=3), picture)["all"]
    two = right(judge, prompt_for("count", [Thing("cross")], count=2), picture)
    assert two["noun"] and not two["count"] and not two["all"]


@pytest.mark.parametrize(
    ("relation", "here", "there"),
    [
        ("left of", (0.25, 0.5), (0.75, 0.5)),
        ("right of", (0.75, 0.5), (0.25, 0.5)),
        ("above", (0.5, 0.25), (0.5, 0.75)),
        ("below", (0.5, 0.75), (0.5, 0.25)),
    ],
)
def test_places_are_judged_by_the_objects_of_the_named_things(judge, relation, here, there):
    first, second = shape("disc", "red").resize((70, 70)), shape("cross", "green").resize((60, 60))
    prompt = prompt_for("relation", [Thing("disc"), Thing("cross")], relation=relation)
    assert right(judge, prompt, scene((first, *here), (second, *there)))["all"]
    turned = right(judge, prompt, scene((first, *there), (second, *here)))
    assert turned["noun"] and not turned["place"] and not turned["all"]
    other = scene((first, *here), (shape("bar", "green").resize((60, 60)), *there))
    half = right(judge, prompt, other)
    assert not half["noun"] and half["place"] and not half["all"]
    alone = right(judge, prompt, scene((first, *here)))
    assert not alone["noun"] and not alone["all"]


def test_an_unparsed_prompt_has_a_neighbour_and_no_verdict(judge):
    prompt = dataclasses.replace(prompt_for("object", [Thing("x")]), kind="other", things=())
    [verdict] = judge.verdicts([(prompt, scene((shape("bar", "red"), 0.5, 0.5)))])
    assert verdict.right == {} and judge.references[verdict.answers[0][0]].noun == "bar"


def test_a_reference_itself_is_at_distance_0_and_others_are_not(judge, references):
    prompt = prompt_for("object", [Thing("disc")])
    same, other = judge.verdicts([(prompt, references[0].pixels()), (prompt, np.full((64, 64, 3), 99, np.uint8))])
    assert same.distance == pytest.approx(0, abs=1e-5) and same.answers[0][0] == 0
    assert other.distance > 1e-3


def test_real_pictures_show_what_their_prompts_ask_for(judge, references):
    nouns = list(SHAPES)
    pairs = real_pictures(references, nouns, per_kind=12, seed=1)
    assert {prompt.kind for prompt, _ in pairs} == set(KINDS)
    verdicts = judge.verdicts(pairs)  # the same pictures are among the references
    share = np.mean([verdict.right["all"] for verdict in verdicts])
    assert share > 0.95
    assert [p for p, _ in real_pictures(references, nouns, 12, seed=1)] == [p for p, _ in pairs]
    assert real_pictures([], nouns, 12, seed=1) == []
    assert {p.things[0].colour for p, _ in pairs if p.kind == "colour"} <= set(TONES)


def test_clip_by_folder(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path / "clip")
    space = load_space(str(tmp_path / "clip"))
    assert isinstance(space, ClipSpace)
    vectors = space(torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8))
    assert vectors.shape == (3, 8) and torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)


def test_other_files_than_networks_are_errors(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        load_space(str(tmp_path / "none.safetensors"))
    with pytest.raises(ModelError, match="not a loadable CLIP model"):
        load_space(str(tmp_path))
