"""The gist of a picture: read in the middle of any LLM, learned beside the next token, leaving nothing behind."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from tests.llm.conftest import make_llm
from tests.llm.test_finetune import LORA, StopAt, logits_of
from v2flow_cli.errors import ModelError
from v2flow_cli.llm.caption_contrast import caption_contrast_loss, middle_layer
from v2flow_cli.llm.loss import labelled_losses
from v2flow_cli.llm.sequences import collate, prompt_ids, sample
from v2flow_cli.llm.vocabulary import extend_tables
from v2flow_cli.training.objectives import drawing as finetuning
from v2flow_cli.training.objectives.drawing import finetune


def test_caption_contrast_loss_by_hand():
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    pictures = torch.tensor([[1, 1, 4, 6], [2, 5, -1, -1], [0, 3, 3, -1]])
    log_probs = logits.log_softmax(-1)
    means = torch.zeros(3, 3)  # (picture, prompt)
    for i, picture in enumerate(pictures):
        ids = [k for k in picture.tolist() if k >= 0]
        for j in range(3):
            means[i, j] = sum(log_probs[j, k] for k in ids) / len(ids)
    roots = torch.tensor([2.0, math.sqrt(2), math.sqrt(3)])
    scores = means * roots[:, None]
    of_picture = -scores.log_softmax(1).diagonal().mean()
    of_prompt = -scores.log_softmax(0).diagonal().mean()
    expected = -means.diagonal().mean() + (of_picture + of_prompt) / 2
    assert caption_contrast_loss(logits, pictures) == pytest.approx(expected.item(), abs=1e-6)
    alone = caption_contrast_loss(logits[:1], pictures[:1])  # no other image in the batch
    assert alone == pytest.approx(-means[0, 0].item(), abs=1e-6)


def test_only_samples_drawn_from_a_caption_have_a_contrast(vocabulary):
    ids = np.array([3, 1, 4, 1])
    drawn, uncaptioned, described = (
        sample(vocabulary, words, ids, to_text=to_text) for words, to_text in (([5], False), ([], False), ([5], True))
    )
    assert drawn["image_ids"].tolist() == [3, 1, 4, 1]
    assert not len(uncaptioned["image_ids"]) and not len(described["image_ids"])
    noisy = sample(vocabulary, [5], ids, read_ids=np.array([9, 9, 9, 9]), label_mask=ids == 3)
    assert noisy["image_ids"].tolist() == [3, 1, 4, 1]
    batch = collate([{**made, "key": "k"} for made in (uncaptioned, drawn, described)], pad_id=2)
    assert batch["image_ids"].tolist() == [[3, 1, 4, 1]] and len(batch["image_starts"]) == 1


def test_the_middle_layer_begins_the_upper_half(llm, text_tokenizer, vocabulary):
    """The states are those that the model itself reports, and asking for them changes no other loss."""
    llm.eval()
    extend_tables(llm, len(text_tokenizer), 64, None, seed=0)
    offset = llm.get_input_embeddings().weight.shape[0] - 66
    vocabulary = replace(vocabulary, visual_token_offset=offset, begin_image_id=offset + 64, end_image_id=offset + 65)
    samples = [sample(vocabulary, words, np.array([7, 8, 9, 7])) for words in ([20, 21, 22], [23])]
    batch = collate(samples, pad_id=2)
    ids, labels = batch["input_ids"], batch["labels"]
    head = llm.get_output_embeddings()
    asked = ids == vocabulary.begin_image_id
    found = labelled_losses(llm, head, ids, labels, (middle_layer(llm), asked.flatten().nonzero()[:, 0]))
    plain = labelled_losses(llm, head, ids, labels)
    assert torch.equal(found.losses, plain.losses) and not len(plain.early_logits)
    states = llm(ids, output_hidden_states=True).hidden_states[1]  # of two layers: what the second one reads
    picked = torch.stack([states[row, len(prompt_ids(vocabulary, w)) - 1] for row, w in enumerate(([1] * 3, [1]))])
    assert torch.allclose(found.early_logits, head(F.rms_norm(picked, picked.shape[-1:])), atol=1e-5)


def test_a_model_without_a_list_of_layers_is_refused(llm):
    class Odd(torch.nn.Module):
        def get_decoder(self):
            return torch.nn.Linear(1, 1)

    assert middle_layer(llm) is llm.model.layers[1]
    with pytest.raises(ModelError, match=r"Odd: caption_contrast needs its list of layers.*Set caption_contrast to 0"):
        middle_layer(Odd())


@pytest.mark.parametrize("family", ["llama", "qwen", "phi", "mixtral"])
def test_the_contrast_is_trained_with_the_next_token_loss(recipe, llm_folder, family):
    log = []
    train = replace(recipe.train, steps=40, log_every=10, batch_size=6, accumulate=1)
    settings = dict(caption_contrast=1.0, train=train, llm=str(llm_folder(family)))
    recipe = replace(recipe, optimizer=replace(recipe.optimizer, learning_rate=1e-2), **settings)
    report = finetune(recipe, log=log.append)
    lines = [line for line in log if "caption_contrast_loss" in line]
    gist = [float(re.search(r"caption_contrast_loss (\S+)", line)[1]) for line in lines]
    answer = [float(re.search(r" loss (\S+)", line)[1]) for line in lines]
    assert gist[-1] < gist[0] - 0.3
    # The loss that is reported is the answer's alone: with the gist in it, it would be twice as much.
    assert report.train_loss == pytest.approx(answer[-1], abs=1e-3) and report.train_loss < math.log(366) + 1
    names = AutoModelForCausalLM.from_pretrained(recipe.output).state_dict().keys()
    assert names == make_llm(family, 300).state_dict().keys()


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_resume_equals_not_stopping(recipe, tmp_path, mode):
    recipe = replace(recipe, caption_contrast=0.5, mode=mode, lora=LORA if mode == "lora" else None)
    log = []
    straight = finetune(recipe, log=log.append)
    assert any("caption_contrast_loss" in line for line in log)
    stopped = replace(recipe, output=str(tmp_path / "stopped"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning, "RunClock", lambda *given: StopAt(3, *given))
        finetune(stopped, log=print)
    resumed = finetune(stopped, log=print, resume=True)
    assert resumed.train_loss == pytest.approx(straight.train_loss, abs=1e-6)
    assert torch.equal(logits_of(recipe.output), logits_of(stopped.output))


def test_gradient_checkpointing_changes_nothing(recipe, tmp_path):
    recipe = replace(recipe, caption_contrast=1.0)
    finetune(recipe, log=print)
    frugal = replace(recipe, train=replace(recipe.train, gradient_checkpointing=True), output=str(tmp_path / "frugal"))
    finetune(frugal, log=print)
    assert torch.allclose(logits_of(recipe.output), logits_of(frugal.output), atol=1e-5)
    without = replace(recipe, caption_contrast=0.0, output=str(tmp_path / "without"))
    finetune(without, log=print)
    assert not torch.allclose(logits_of(recipe.output), logits_of(without.output), atol=1e-4)
