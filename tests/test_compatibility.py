"""What commit a4f45f9 wrote (in tests/compatibility) still loads: folders, tokens, shards, checkpoints, recipes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from v2flow_cli.cli.app import app
from v2flow_cli.errors import RecipeError
from v2flow_cli.llm.sample import DrawingLM
from v2flow_cli.recipe import load_recipe
from v2flow_cli.store.shards import index_shard
from v2flow_cli.store.token_file import load_token_ids
from v2flow_cli.store.token_manifest import TokenManifest
from v2flow_cli.tokenizer import V2FlowTokenizer

FOLDER = Path(__file__).parent / "compatibility" / "a4f45f9"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A copy to work in; the recipes in it name its folders."""
    shutil.copytree(FOLDER, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done.output


def test_token_files_belong_to_the_published_folder_and_decode_to_the_same_pixels(here):
    manifest = TokenManifest.load(here / "tokens")
    assert manifest.tokenizer_digest == V2FlowTokenizer.from_pretrained(here / "tokenizer").token_digest
    run("decode", "tokens", "-o", "again", "--model", "tokenizer", "--dtype", "fp32")
    for name in ("astronaut", "chelsea", "coffee"):
        before, after = (
            np.asarray(Image.open(here / folder / "shard-000000" / f"{name}.png"), dtype=int)
            for folder in ("decoded", "again")
        )
        assert np.abs(before - after).max() <= 1


def test_shards_are_read_by_their_index_and_give_the_same_tokens(here):
    index = index_shard(here / "shards" / "shard-000000.tar", "full")
    assert [sample.key for sample in index.samples] == ["astronaut", "chelsea", "coffee"] and not index.failures
    run("encode", "shards", "-o", "again", "--model", "tokenizer", "--res", 32, "--dtype", "fp32")
    before, after = (load_token_ids(here / folder / "shard-000000.npy", 32) for folder in ("tokens", "again"))
    assert np.array_equal(before, after)


def test_a_checkpoint_of_a_tokenizer_is_resumed(here):
    published = load_file(here / "tokenizer" / "model.safetensors")
    (here / "tokenizer" / "model.safetensors").unlink()
    run("train", "tokenizer/recipe.yaml", "--resume")
    again = load_file(here / "tokenizer" / "model.safetensors")
    assert published.keys() == again.keys()
    far = {name: (published[name] - again[name]).abs().max().item() for name in published}
    assert max(far.values()) < 0.01, far  # one step of it, whose sums may round otherwise


def test_a_checkpoint_of_a_drawing_llm_is_resumed(here):
    published = load_file(here / "llm" / "model.safetensors")
    (here / "llm" / "model.safetensors").unlink()
    run("finetune-llm", "llm/recipe.yaml", "--resume")
    again = load_file(here / "llm" / "model.safetensors")
    assert max((published[name] - again[name]).abs().max().item() for name in published) < 0.01


def test_a_drawing_llm_draws(here):
    llm = DrawingLM.from_pretrained(here / "llm")
    assert llm.vocabulary.tokens_per_image == 4
    run("generate", "a photo of coffee", "--model", "llm", "--tokenizer", "tokenizer", "-o", "drawn")
    assert list((here / "drawn").glob("*.png"))


def test_a_folder_whose_config_has_retired_keys_loads(here):
    words = json.loads((here / "knobs" / "config.json").read_text())["vocabulary"]
    assert words["temperature_start"] == 2.0 and words["temperature_steps"] == 3
    model = V2FlowTokenizer.from_pretrained(here / "knobs")
    assert model.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


def test_errors_of_retired_keys_name_the_replacement(here):
    with pytest.raises(RecipeError) as error:
        load_recipe(here / "knobs" / "recipe.yaml")
    text = str(error.value)
    assert "3 problem(s)" in text
    for key in ("vocabulary.temperature_steps is 3", "loss.isometry is 0.1", "loss.commit_ramp_steps is 2"):
        assert f"{key}; this key was removed" in text
    recipe = here / "llm" / "recipe.yaml"
    assert load_recipe(recipe).caption_contrast == 0  # the old key at its neutral value
    with pytest.raises(RecipeError, match=r"gist_loss is 0\.3; this key is called caption_contrast now"):
        load_recipe(recipe, ["gist_loss=0.3"])


def test_a_run_that_used_a_retired_key_is_not_resumed_without_it(here):
    state = here / "tokenizer" / "checkpoints" / "step-00000003" / "state.json"
    record = json.loads(state.read_text())
    record["state"]["recipe"] = record["state"]["recipe"].replace("isometry: 0.0", "isometry: 0.5")
    state.write_text(json.dumps(record))
    done = CliRunner().invoke(app, ["train", "tokenizer/recipe.yaml", "--resume"])
    assert done.exit_code == 1 and "loss.isometry is 0.5; this key was removed" in done.stderr
