import json
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from v2flow_cli.bench.llm import caption_losses, measure_llm, training_counts
from v2flow_cli.cli.app import app
from v2flow_cli.errors import ModelError
from v2flow_cli.llm.sample import DrawingLM
from v2flow_cli.llm.sequences import prompt_frame
from v2flow_cli.llm.vocabulary import VisualVocabulary, add_visual_tokens, extend_tables
from v2flow_cli.store.token_file import TokenSample
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.training.objectives.language_model import train_tokenizer


@pytest.fixture
def folder(tiny_tokenizer_folder, tmp_path):
    """A random LLM that draws 4 tokens of the tiny tokenizer."""
    tokenizer = train_tokenizer(["a red fox", "two dogs on a beach"], 300)
    words = len(tokenizer)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=words, max_position_embeddings=256, **sizes))
    extend_tables(model, words, 64, None, seed=0)
    digest = V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder).token_digest
    vocabulary = VisualVocabulary(words, 64, words + 64, words + 65, 4, digest, *prompt_frame(tokenizer), 1)
    model.config.v2flow = vocabulary.record()
    model.save_pretrained(tmp_path / "llm")
    add_visual_tokens(tokenizer, words, 64).save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"


def pairs(count=6, seed=0):
    ids = np.random.default_rng(seed).integers(0, 64, (count, 4))
    return [TokenSample(f"k{i}", (f"caption {i} of a fox" + " again" * i,), row) for i, row in enumerate(ids)]


def test_losses_are_log_probabilities_of_the_visual_tokens(folder):
    llm, made = DrawingLM.from_pretrained(folder), pairs(3)
    captions = [pair.captions[0] for pair in made]
    found = caption_losses(llm, captions, made, batch_size=2)
    for caption, pair, loss in zip(captions, made, found):
        prompt = llm.prompt(caption)
        visual = (pair.token_ids + llm.vocabulary.visual_token_offset).tolist()
        logits = llm.model(torch.tensor([prompt + visual])).logits[0].log_softmax(-1)
        by_hand = -sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(visual))
        assert float(loss) == pytest.approx(float(by_hand), abs=1e-4)


def test_matched_share_of_an_llm_that_uses_captions_and_of_one_that_does_not(folder, monkeypatch):
    llm, made = DrawingLM.from_pretrained(folder), pairs()
    own = {pair.captions[0]: i for i, pair in enumerate(made)}

    def listening(llm, captions, pairs, batch_size, tick):
        return torch.tensor([20.0 if own.get(c) == i else 24.0 for i, c in enumerate(captions)], dtype=torch.float64)

    monkeypatch.setattr("v2flow_cli.bench.llm.caption_losses", listening)
    found = measure_llm(llm, made)
    assert found.matched_share == 1 and found.matched_ci95 == 0
    assert (found.visual_loss, found.other_caption_loss, found.no_caption_loss) == (5.0, 6.0, 6.0)
    monkeypatch.setattr(
        "v2flow_cli.bench.llm.caption_losses", lambda *given: torch.full((6,), 3.0, dtype=torch.float64)
    )
    assert measure_llm(llm, made).matched_share == 0.5


def test_unigrams_by_hand(folder):
    llm = DrawingLM.from_pretrained(folder)
    made = [TokenSample("a", ("x",), np.array([0, 0, 0, 0])), TokenSample("b", ("y",), np.array([1, 1, 2, 3]))]
    assert training_counts(llm) is None
    found = measure_llm(llm, made)
    assert found.unigram_trained is None and found.tokens == 8
    # half of the ids are 0, a quarter 1, and one eighth each 2 and 3
    assert found.unigram_entropy == pytest.approx((0.5 + 0.5 + 0.75) * math.log(2))
    assert found.ln_codebook_size == pytest.approx(math.log(64))
    np.save(folder / "token_counts.npy", np.arange(64) == 0)  # one token was seen, the code 0
    seen = DrawingLM.from_pretrained(folder)
    assert measure_llm(seen, made).unigram_trained == pytest.approx((4 * math.log(65 / 2) + 4 * math.log(65)) / 8)
    np.save(folder / "token_counts.npy", np.zeros(3))
    with pytest.raises(ModelError, match=r"shape is \(3,\); expected \(64,\)"):
        training_counts(seen)


def test_photos_and_their_tokens_give_the_same_figures(folder, tiny_tokenizer_folder, tmp_path, sample_images):
    photos, tokens = tmp_path / "photos", tmp_path / "tokens"
    photos.mkdir()
    common = ["--llm", "--llm-model", str(folder), "--model", str(tiny_tokenizer_folder), "--json"]
    alone = CliRunner().invoke(app, ["bench", *common])
    assert alone.exit_code == 2 and "Missing argument" in alone.stderr
    for i, image in enumerate(sample_images[:3]):
        image.resize((40, 40)).save(photos / f"{i}.png")
    bare = CliRunner().invoke(app, ["bench", str(photos), *common])
    assert bare.exit_code == 1 and "0 captioned images; expected at least 2" in bare.stderr
    for i in range(3):
        (photos / f"{i}.txt").write_text(f"photo number {i}")
    assert CliRunner().invoke(app, ["shard", str(photos), "-o", str(tmp_path / "shards")]).exit_code == 0
    encoded = CliRunner().invoke(
        app, ["encode", str(tmp_path / "shards"), "-o", str(tokens), "--model", str(tiny_tokenizer_folder)]
    )
    assert encoded.exit_code == 0, encoded.output
    ran = [CliRunner().invoke(app, ["bench", str(source), *common]) for source in (photos, tokens)]
    assert [r.exit_code for r in ran] == [0, 0], ran[0].output
    by_photos, by_tokens = (json.loads(r.stdout) for r in ran)
    assert by_photos.pop("not_taken") == by_tokens.pop("not_taken") == []
    assert by_photos == pytest.approx(by_tokens) and by_photos["photos"] == 3
    plain = CliRunner().invoke(app, ["bench", str(tokens), *common[:-1]])
    assert "more likely under their own caption" in plain.stdout and "nats a token" in plain.stdout
