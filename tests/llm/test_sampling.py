"""How an LLM draws by default is kept in its folder, and read before the weights are."""

import json

import pytest

from v2flow_cli.errors import ModelError, RecipeError
from v2flow_cli.llm.sampling import stored_sampling
from v2flow_cli.recipe.load import load_recipe
from v2flow_cli.recipe.schema import DrawSampling


def test_a_folder_keeps_its_sampling(tmp_path):
    assert stored_sampling(tmp_path) == DrawSampling()
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.6, "top_p": 0.9}))  # a text model's own, and not sampled
    assert stored_sampling(tmp_path) == DrawSampling()
    path.write_text(json.dumps({"do_sample": True, "temperature": 0.8, "top_k": 50, "eos_token_id": 1}))
    assert stored_sampling(tmp_path) == DrawSampling(temperature=0.8, top_k=50)


@pytest.mark.parametrize("content", ["{", "[1]", '{"do_sample": true, "top_k": "many"}'])
def test_a_damaged_file_is_an_error(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"generation_config\.json: cannot be read"):
        stored_sampling(tmp_path)


def test_a_recipe_says_how_its_llm_draws():
    recipe = load_recipe("recipes/tiny/llm.yaml", ["sampling.temperature=0.9", "sampling.top_k=100"])
    assert recipe.sampling == DrawSampling(temperature=0.9, top_k=100)
    with pytest.raises(RecipeError, match=r"sampling\.top_p is 2\.0; expected a share in \[0, 1\]"):
        load_recipe("recipes/tiny/llm.yaml", ["sampling.top_p=2"])
