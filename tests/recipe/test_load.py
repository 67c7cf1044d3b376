import dataclasses
import re

import hypothesis.strategies as st
import pytest
from hypothesis import given

from v2flow_cli.errors import RecipeError
from v2flow_cli.recipe import dump_recipe, load_recipe

from ..conftest import RECIPES, STAGES

TOKENIZER = RECIPES / "tiny" / "tokenizer.yaml"


@pytest.mark.parametrize("path", STAGES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_recipe_validates_and_survives_a_round_trip(path, tmp_path):
    recipe = load_recipe(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(copy) == recipe


@pytest.mark.parametrize("path", STAGES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_the_header_of_a_variant_lists_its_differences_from_the_base(path):
    head = " ".join(line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    stated = re.search(r"Differs from (recipes/\S+\.yaml) in ([a-z0-9_.]+=.+?)\.(?: |$)", head)
    family = path.parent.name == "paper" and path.stem not in ("large", "llm-llama2-7b")
    if stated is None:
        assert not family
        return
    recipe = load_recipe(path)
    changes = [*re.split(r", (?=[a-z0-9_.]+=)", stated[2]), f"output={recipe.output}"]
    assert load_recipe(RECIPES.parent / stated[1], changes) == recipe


def test_overrides_replace_values_and_keep_their_type():
    recipe = load_recipe(TOKENIZER, ["train.steps=3", "optimizer.learning_rate=2e-4", "data.sources=[a, b]"])
    assert (recipe.train.steps, recipe.optimizer.learning_rate, recipe.data.sources) == (3, 2e-4, ("a", "b"))


def test_all_problems_are_reported_at_once(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text(TOKENIZER.read_text().replace("codebook_size:", "codebok_size:").replace("steps: 6", "steps: six"))
    with pytest.raises(RecipeError) as error:
        load_recipe(bad)
    message = str(error.value)
    assert "quantizer.codebok_size is not a known key; did you mean quantizer.codebook_size?" in message
    assert "quantizer.codebook_size is missing" in message
    assert "train.steps is 'six'; expected int" in message


@pytest.mark.parametrize(
    "override,expected",
    [
        ("vocabulary.generator=teid", "did you mean tied?"),
        ("sampling.solver=ddim", "use euler, heun or dpm++"),
        ("context.num_heads=3", "multiple of 4 x num_heads"),
        ("resampler.tokens_per_256px=100", "expected 64, 128 or 256"),
        ("data.horizontal_flip=yes please", "expected bool"),
        ("resampler.depth=[1]", "expected a list of 2 values"),
        ("train.accumulate=3", "multiple of train.accumulate"),
    ],
)
def test_values_are_checked(override, expected):
    with pytest.raises(RecipeError, match=expected.replace("?", r"\?").replace("+", r"\+")):
        load_recipe(TOKENIZER, [override])


def test_bad_files_and_overrides(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(RecipeError, match="expected a mapping"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(tmp_path / "broken.yaml")
    with pytest.raises(RecipeError, match="expected KEY=VALUE"):
        load_recipe(TOKENIZER, ["train.steps"])
    with pytest.raises(RecipeError, match="kind is 'soup'"):
        load_recipe(TOKENIZER, ["kind=soup"])
    with pytest.raises(RecipeError, match="use `v2flow train`"):
        load_recipe(TOKENIZER, kinds=("lm",))


NUMBERS = {
    "optimizer.learning_rate": [".nan", ".inf", "-1", "1e400"],
    "optimizer.betas": ["[0.9, 1.0]", "[-0.1, 0.9]", "[.nan, 0.9]"],
    "train.steps": ["0", "-1", "99999999999999999999999"],
    "train.batch_size": ["0", "-4"],
    "train.accumulate": ["0"],
    "train.seed": ["-1", "4294967296"],
    "train.ema_decay": ["1", ".nan"],
    "train.log_every": ["0"],
    "train.keep_checkpoints": ["0"],  # which would keep none, not all
    "data.crop_size": ["0", "-64"],
    "data.workers": ["-1"],
    "data.error_budget": ["2", "-0.1"],
    "image_size": ["0"],
    "flow.repeats": ["0"],
    "loss.flow": [".nan", "-1"],
    "resampler.hidden_size": ["0", "1000000000"],  # the bytes of such weights do not fit into 64 bits
    "sampling.num_flow_steps": ["0", "99999999999999999999"],
    "sampling.num_mask_steps": ["100000"],
    "sampling.guidance_scale": ["-.inf"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in NUMBERS.items() for value in values])
def test_numbers_have_ranges(key, value):
    with pytest.raises(RecipeError, match=rf"{key} is .*; expected (a|at least) .*") as caught:
        load_recipe(TOKENIZER, [f"{key}={value}"])
    assert str(caught.value).count("  - ") == 1


def numbers_of(tree, prefix=""):
    for field in dataclasses.fields(tree):
        value = getattr(tree, field.name)
        if dataclasses.is_dataclass(value):
            yield from numbers_of(value, f"{prefix}{field.name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{field.name}"


@pytest.mark.parametrize("kind", ["autoencoder", "tokenizer", "lm", "llm"])
@given(st.data())
def test_no_number_of_a_recipe_may_be_nan_or_infinite_or_huge(kind, data):
    path = RECIPES / "tiny" / f"{kind}.yaml"
    key = data.draw(st.sampled_from(sorted(numbers_of(load_recipe(path)))))
    value = data.draw(st.sampled_from([".nan", ".inf", "-.inf", str(10**30), str(-(10**30))]))
    with pytest.raises(RecipeError, match=f"{key} is"):
        load_recipe(path, [f"{key}={value}"])


@pytest.mark.parametrize("key", ["output", "latents.autoencoder"])
def test_a_path_with_a_zero_byte_is_refused(key):
    with pytest.raises(RecipeError, match=f"{key} is .*without a zero byte"):
        load_recipe(TOKENIZER, [f'{key}="a\\0b"'])


def test_false_is_parsed_as_a_boolean():
    assert load_recipe(TOKENIZER, ["data.horizontal_flip=False"]).data.horizontal_flip is False
