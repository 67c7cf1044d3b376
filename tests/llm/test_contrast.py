"""Telling a picture's caption from another's, and going on with an LLM that draws already."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from v2flow_cli.errors import ModelError, RecipeError
from v2flow_cli.llm.finetune import DrawingTrainer, finetune, plan
from v2flow_cli.llm.loss import choice_losses
from v2flow_cli.llm.sequences import collate, sample
from v2flow_cli.llm.trainer import training_arguments
from v2flow_cli.recipe.load import load_recipe

from .conftest import CODES, make_llm
from .test_finetune import recipe  # noqa: F401  the fixture

PICTURES = np.arange(12).reshape(3, 4)
LOG_2 = math.log(2)


def samples(vocabulary):
    """Two pictures with a caption, one without, and one that is to be named."""
    made = [sample(vocabulary, words, ids) for words, ids in zip(([20], [], [21, 22]), PICTURES)]
    made.append(sample(vocabulary, [23], PICTURES[0], to_text=True))
    return [{**one, "key": str(i)} for i, one in enumerate(made)]


def test_answers_are_repeated_after_the_next_caption(vocabulary):
    batch = collate(samples(vocabulary), pad_id=2, swapped=True)
    assert batch["swapped_from"].tolist() == [0, 2] and batch["keys"] == ["0", "1", "2", "3"]
    first, second = ([300 + i for i in PICTURES[k]] + [365, 1] for k in (0, 2))
    assert batch["input_ids"][4].tolist() == [0, 21, 22, 9, 364, *first]
    assert batch["labels"][4].tolist() == [-100] * 5 + first
    assert batch["input_ids"][5].tolist() == [0, 20, 9, 364, *second, 2]
    assert batch["labels"][5].tolist() == [-100] * 4 + second + [-100]
    plain = collate(samples(vocabulary), pad_id=2)
    assert torch.equal(plain["input_ids"], batch["input_ids"][:4]) and len(plain["swapped_from"]) == 0


def test_one_caption_alone_has_no_other(vocabulary):
    batch = collate(samples(vocabulary)[:2], pad_id=2, swapped=True)
    assert len(batch["swapped_from"]) == 0 and len(batch["input_ids"]) == 2


def test_choice_is_bayes_rule_by_hand():
    losses, rows = torch.tensor([1.0, 2.0, 5.0, 0.5, 4.0]), torch.tensor([0, 0, 1, 2, 3])
    found = choice_losses(losses, rows, 4, torch.tensor([0, 1]))
    own, other = np.exp([-3.0, -5.0]), np.exp([-0.5, -4.0])
    assert found.tolist() == pytest.approx((-np.log(own / (own + other))).tolist(), abs=1e-6)


def test_contrast_is_added_to_the_loss_and_logged(text_tokenizer, vocabulary, recipe, tmp_path):  # noqa: F811
    llm = make_llm("llama", 400).train()
    batch = collate(samples(vocabulary), pad_id=2, swapped=True)
    trainer = DrawingTrainer(
        model=llm,
        args=training_arguments(recipe.optimizer, recipe.train, tmp_path / "t"),
        vocabulary=vocabulary,
        z_loss=0.0,
        contrast=3.0,
    )
    with torch.no_grad():
        log_p = llm(batch["input_ids"]).logits.log_softmax(-1)[:, :-1]
        learned = batch["labels"][:, 1:] != -100
        nats = -log_p.gather(2, batch["labels"][:, 1:].clamp_min(0)[..., None])[..., 0] * learned
        pictures = (nats * vocabulary.is_visual(batch["labels"][:, 1:])).sum(1)
        chosen = torch.nn.functional.softplus(pictures[[0, 2]] - pictures[[4, 5]])
        expected = (nats[:4].sum() + 3 * chosen.sum()) / learned[:4].sum()
        assert trainer.compute_loss(llm, batch).item() == pytest.approx(expected.item(), rel=1e-5)
        _, count = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        assert count == learned[:4].sum()
        assert trainer.compute_loss(llm, batch, num_items_in_batch=count).item() == pytest.approx(expected.item())
    assert trainer.sums[2].tolist() == pytest.approx([2 * chosen.sum().item(), 4])
    trainer.compute_loss(llm, batch).backward()
    assert llm.lm_head.weight.grad.abs().sum() > 0


def test_captions_are_told_apart_after_some_steps(recipe):  # noqa: F811
    """Each photo has one caption; what is asked for is learned, down from the ln 2 of a guess."""
    log = []
    train = replace(recipe.train, steps=60, batch_size=8, log_every=60, save_every=60)
    data = replace(recipe.data, caption_dropout=0.0)
    optimizer = replace(recipe.optimizer, learning_rate=1e-2)
    finetune(replace(recipe, contrast=2.0, train=train, data=data, optimizer=optimizer), log=log.append)
    logged = next(line for line in log if line.startswith("step 60/60  loss"))
    assert float(logged.partition("contrast_loss ")[2].split()[0]) < 0.8 * LOG_2, logged


def test_held_out_loss_has_no_contrast(recipe, tmp_path):  # noqa: F811
    held_out = replace(recipe, data=replace(recipe.data, held_out_share=0.3))
    still = replace(held_out, optimizer=replace(recipe.optimizer, learning_rate=1e-12))
    plain = finetune(still, log=print).eval_loss
    asked = finetune(replace(still, contrast=5.0, output=str(tmp_path / "asked")), log=print).eval_loss
    assert asked == pytest.approx(plain, rel=1e-6)


def test_an_llm_that_draws_goes_on_from_its_own_rows(recipe, tmp_path):  # noqa: F811
    finetune(recipe, log=print)
    next_stage = replace(recipe, llm=recipe.output, output=str(tmp_path / "next"), contrast=1.0)
    with pytest.raises(ModelError, match=r"visual tokens already.*--set new_rows=kept"):
        finetune(next_stage, log=print)
    kept = replace(next_stage, new_rows="kept")
    assert plan(kept)["parameters"] == plan(recipe)["parameters"]
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


def test_kept_rows_need_an_llm_that_draws_these_tokens(recipe, tmp_path):  # noqa: F811
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


def test_contrast_needs_company(request):
    tiny = request.config.rootpath / "recipes/tiny/llm.yaml"
    for settings in (["contrast=-1"], ["contrast=1", "train.batch_size=1"]):
        with pytest.raises(RecipeError, match="contrast is"):
            load_recipe(tiny, settings)
