"""Going on with an LLM that draws already."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from v2flow_cli.errors import ModelError
from v2flow_cli.training.objectives.drawing import finetune, plan

from .conftest import CODES


def test_a_drawing_llm_is_trained_further_from_its_rows(recipe, tmp_path):
    parameters = plan(recipe)["parameters"]
    finetune(recipe, log=print)
    next_stage = replace(recipe, llm=recipe.output, output=str(tmp_path / "next"))
    with pytest.raises(ModelError, match=r"visual tokens already.*--set new_rows=kept"):
        finetune(next_stage, log=print)
    kept = replace(next_stage, new_rows="kept")
    assert plan(kept)["parameters"] == parameters
    slow = replace(kept, optimizer=replace(kept.optimizer, learning_rate=1e-9))
    finetune(slow, log=print)
    before, after = (load_file(Path(folder, "model.safetensors")) for folder in (recipe.output, slow.output))
    assert before.keys() == after.keys()
    for name in before:
        assert torch.allclose(before[name], after[name], atol=1e-6), name
    words, found = (Path(folder, "tokenizer.json").read_text() for folder in (recipe.output, slow.output))
    assert words == found
    rows = replace(kept, mode="rows", output=str(tmp_path / "rows"))
    assert plan(rows)["trained_parameters"] == 2 * (CODES + 2) * 16
    finetune(rows, log=print)
    moved = load_file(Path(rows.output, "model.safetensors"))["lm_head.weight"]
    assert torch.equal(moved[:300], before["lm_head.weight"][:300])
    assert not torch.equal(moved[300:], before["lm_head.weight"][300:])


def test_kept_rows_need_an_llm_that_draws_these_tokens(recipe, tmp_path):
    kept = replace(recipe, new_rows="kept")
    for run in (lambda: finetune(kept, log=print), lambda: plan(kept)):
        with pytest.raises(ModelError, match="cannot draw"):
            run()
    finetune(recipe, log=print)
    config = Path(recipe.output, "config.json")
    digest = kept_digest(config)
    config.write_text(config.read_text().replace(digest, "f" * 16))
    other = replace(kept, llm=recipe.output, output=str(tmp_path / "next"))
    for run in (lambda: finetune(other, log=print), lambda: plan(other)):
        with pytest.raises(ModelError, match=rf"draws tokens of tokenizer f{{16}}, but .* {digest}.*tokenizer=FOLDER"):
            run()


def kept_digest(config):
    return config.read_text().partition('"tokenizer_digest": "')[2][:16]
