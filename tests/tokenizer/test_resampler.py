import pytest
import torch
import torch.nn.functional as F

from v2flow_cli.recipe.schema import Resampler, Vocabulary
from v2flow_cli.tokenizer.resampler import GridResampler, VocabularyProjection


def projection(generator="tied", top_k=0, words=50, temperature=1.0):
    torch.manual_seed(0)
    made = VocabularyProjection(Vocabulary("x", generator, 10.0, temperature, 1.0, 0, top_k), 16, words, 12)
    made.set_table(0.02 * torch.randn(words, 12) + 0.3)
    return made


@pytest.mark.parametrize("tokens,expected", [(64, 64), (128, 128), (256, 256)])
def test_token_counts_at_256_and_512(tokens, expected):
    made = GridResampler(Resampler(16, (1, 1), tokens), 4, 8)
    assert made(torch.randn(1, 4, 32, 32)).shape == (1, expected, 16)
    assert made(torch.randn(1, 4, 64, 64)).shape == (1, 4 * expected, 16)
    assert made(torch.randn(1, 4, 32, 64)).shape == (1, 2 * expected, 16)


@pytest.mark.parametrize("generator", ["tied", "free"])
def test_mixtures_are_in_the_hull_of_the_vocabulary(generator):
    made = projection(generator)
    out = made(torch.randn(2, 3, 16))
    assert out.embeddings.shape == (2, 3, 12)
    low, high = made.table.min(0).values, made.table.max(0).values
    assert ((out.embeddings >= low) & (out.embeddings <= high)).all()


def test_codebook_maps_back_to_the_llm_rows():
    rows = 0.02 * torch.randn(50, 12) + 0.3
    made = projection()
    made.set_table(rows)
    assert torch.allclose(made.codebook_to_llm(made.table), rows, atol=1e-6)


@pytest.mark.parametrize("generator", ["tied", "free"])
def test_top_k_of_the_whole_vocabulary_is_the_full_mixture(generator):
    tokens = torch.randn(2, 3, 16)
    full, top = projection(generator), projection(generator, top_k=50)
    top.load_state_dict(full.state_dict())
    assert torch.allclose(full(tokens).embeddings, top(tokens).embeddings, atol=1e-5)


def test_top_k_finds_the_best_words_across_chunks(monkeypatch):
    monkeypatch.setattr("v2flow_cli.tokenizer.resampler.VOCAB_CHUNK", 7)
    made, tokens = projection(top_k=3), torch.randn(1, 4, 16)
    projected = made.generator(tokens)
    logits, _ = made._top_logits(projected)
    scores = 10.0 * F.normalize(projected, dim=-1) @ F.normalize(made.table, dim=-1).T
    assert torch.allclose(logits, scores.topk(3, -1).values, atol=1e-4)


def test_noise_only_when_asked_for():
    made, tokens = projection(), torch.randn(1, 4, 16)
    assert torch.equal(made(tokens).embeddings, made(tokens).embeddings)
    assert not torch.equal(made(tokens, 1.0).embeddings, made(tokens, 1.0).embeddings)


def test_gumbel_noise_samples_the_categorical():
    # With temperature near 0 the noisy argmax is a draw from softmax(logits).
    made = projection("free", words=3, temperature=1e-3)
    torch.nn.init.zeros_(made.generator.weight)
    made.generator.bias.data.copy_(torch.log(torch.tensor([0.6, 0.3, 0.1])))
    out = made(torch.zeros(1, 20000, 16), noise_scale=1.0)
    picked = torch.cdist(out.embeddings[0], made.table).argmin(-1)
    share = torch.bincount(picked, minlength=3) / 20000
    assert torch.allclose(share, torch.tensor([0.6, 0.3, 0.1]), atol=0.02)
