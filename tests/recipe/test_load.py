from pathlib import Path

import pytest

from v2flow_cli.errors import RecipeError
from v2flow_cli.recipe import dump_recipe, load_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
TOKENIZER = RECIPES / "tiny" / "tokenizer.yaml"


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_recipe_validates_and_survives_a_round_trip(path, tmp_path):
    recipe = load_recipe(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(copy) == recipe


def test_overrides_win_and_keep_their_type():
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


def test_false_is_false():
    assert load_recipe(TOKENIZER, ["data.horizontal_flip=False"]).data.horizontal_flip is False
