"""Language model training that never makes the host wait for the device between log lines, at few widths."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.training.test_lean_steps import Reads, Shapes
from v2flow_cli.llm import pairs
from v2flow_cli.llm.sequences import collate, sample
from v2flow_cli.training.llm_trainer import EAGER_LONGEST, LMTrainer, choose_attention, compile_layers
from v2flow_cli.training.objectives import drawing
from v2flow_cli.training.objectives.drawing import DrawingTrainer, finetune

from .conftest import make_llm


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The host reads numbers only when a line is due, and moves no tensor; both work on a CPU too."""
    monkeypatch.setattr(LMTrainer, "_defers_reading", True)
    monkeypatch.setattr("v2flow_cli.training.llm_trainer.fuses", lambda device: True)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_no_step_waits_for_the_device_between_log_lines(recipe, as_on_a_gpu, monkeypatch, kind):
    """From the batch's arrival on the device to the moved weights, with both kinds of labels and the contrast."""
    found, counts = Counter(), []
    plain_step, plain_norm = DrawingTrainer.training_step, DrawingTrainer._get_grad_norm

    def training_step(self, *args, **kwargs):
        with Shapes(found), Reads(found):
            return plain_step(self, *args, **kwargs)

    def get_grad_norm(self, *args, **kwargs):
        with Shapes(found), Reads(found):
            norm = plain_norm(self, *args, **kwargs)
        counts.append(found.total())
        return norm

    monkeypatch.setattr(DrawingTrainer, "training_step", training_step)
    monkeypatch.setattr(DrawingTrainer, "_get_grad_norm", get_grad_norm)
    data = replace(recipe.data, image_to_text_share=0.3, token_noise=0.5, label_share=0.5)
    made = replace(recipe, data=data, caption_contrast=0.5, optimizer=replace(recipe.optimizer, kind=kind))
    made = replace(
        made, train=replace(recipe.train, steps=4, log_every=4, batch_size=4, skip_bad_steps=1, save_every=0)
    )
    report = finetune(made, log=print)
    assert report.steps == 4 and math.isfinite(report.train_loss)
    assert counts == [0] * 4, found


def test_a_bad_step_is_counted_at_the_next_log_line(recipe, as_on_a_gpu, monkeypatch):
    plain = drawing.labelled_losses
    calls = []

    def losses(model, *args):
        found = plain(model, *args)
        calls.append(1)
        return found._replace(losses=found.losses * (math.nan if len(calls) == 2 and model.training else 1))

    monkeypatch.setattr(drawing, "labelled_losses", losses)
    log = []
    train = replace(recipe.train, steps=4, log_every=2, accumulate=1, skip_bad_steps=1)
    report = finetune(replace(recipe, train=train), log=log.append)
    assert report.steps == 4 and math.isfinite(report.train_loss)
    assert [line for line in log if "step 1, rank 0: the loss is not finite (nan)" in line and "1 of 1" in line]
    lines = [line for line in log if line.startswith("step 2/4")]
    assert lines and "nan" not in lines[0]


def test_widths_are_few_and_padding_changes_no_loss(vocabulary):
    words = [20, 21, 22]
    samples = [{**sample(vocabulary, w, np.arange(4)), "key": "k"} for w in ([], words)]
    narrow, wide = collate(samples, pad_id=2), collate(samples, pad_id=2, multiple=64)
    assert wide["input_ids"].shape == (2, 64) and narrow["input_ids"].shape[1] < 20
    model = make_llm("llama", 366).eval()
    found = [
        drawing.labelled_losses(
            model, model.get_output_embeddings(), b["input_ids"], b["labels"], None, b["positions"]
        ).losses
        for b in (narrow, wide)
    ]
    torch.testing.assert_close(*found)
    begins = wide["input_ids"].flatten()[wide["image_starts"]]
    assert begins.tolist() == [vocabulary.begin_image_id]


def test_a_caption_is_tokenised_once(recipe, text_tokenizer, vocabulary, monkeypatch):
    calls, plain = [], pairs.caption_ids
    monkeypatch.setattr(pairs, "caption_ids", lambda tokenizer, text: (calls.append(text), plain(tokenizer, text))[1])
    stream = iter(pairs.Samples(recipe.data, text_tokenizer, vocabulary, seed=0))
    for _ in range(200):
        next(stream)
    assert len(calls) == len(set(calls)) <= 25  # 12 images of 2 captions, and the empty one


def test_a_layer_is_one_graph(vocabulary):
    model = make_llm("llama", 366)
    ids = torch.arange(24).reshape(2, 12)
    plain = model(ids, use_cache=False).logits
    torch._dynamo.reset()
    for layer in model.get_decoder().layers:
        layer.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    compiled = model(ids, use_cache=False).logits
    compiled.sum().backward()
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    compile_layers(_NoLayers())  # nothing to compile, and no error


class _NoLayers(torch.nn.Module):
    def get_decoder(self):
        return self


def test_short_sequences_on_a_cpu_have_plain_attention_of_the_same_values(tmp_path):
    model = make_llm("qwen", 300).eval()
    ids = torch.arange(24).view(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    with torch.no_grad():
        fused = model(input_ids=ids, attention_mask=mask).logits
        for longest, device, kind in (
            (EAGER_LONGEST + 1, "cpu", "sdpa"), (12, "cuda", "sdpa"), (EAGER_LONGEST, "cpu", "eager")
        ):  # fmt: skip
            choose_attention(model, longest, torch.device(device))
            assert model.config._attn_implementation == kind
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits[mask > 0], fused[mask > 0])
    model.save_pretrained(tmp_path)
    assert "eager" not in (tmp_path / "config.json").read_text()
