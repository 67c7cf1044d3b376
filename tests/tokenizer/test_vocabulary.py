import pytest
import torch
import torch.nn.functional as F

from v2flow_cli.recipe.schema import Vocabulary
from v2flow_cli.tokenizer.vocabulary import NearestWords, VocabularyProjection


def projection(generator="tied", top_k=0, words=50, temperature=1.0):
    torch.manual_seed(0)
    made = VocabularyProjection(Vocabulary("x", generator, 10.0, temperature, 1.0, 0, top_k), 16, words, 12)
    made.set_table(0.02 * torch.randn(words, 12) + 0.3)
    return made


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


def test_whitened_rows_have_unit_covariance_and_map_back():
    torch.manual_seed(0)
    rows = torch.randn(500, 12) * torch.tensor([30.0] + [1.0] * 11) + 5  # one direction outweighs the others
    settings = Vocabulary("x", "tied", 10.0, 1.0, 1.0, 0, 0, whiten=True)
    made = VocabularyProjection(settings, 16, 500, 12)
    made.set_table(rows)
    covariance = made.table.T @ made.table / len(rows)
    assert torch.allclose(covariance, torch.eye(12), atol=0.02)  # the floor takes up to 1% from the weakest
    assert torch.allclose(made.codebook_to_llm(made.table), rows, atol=1e-3)
    again = VocabularyProjection(settings, 16, 500, 12)
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.codebook_to_llm(made.table), made.codebook_to_llm(made.table))


@pytest.mark.parametrize("generator", ["tied", "free"])
def test_top_k_of_the_whole_vocabulary_is_the_full_mixture(generator):
    tokens = torch.randn(2, 3, 16)
    full, top = projection(generator), projection(generator, top_k=50)
    top.load_state_dict(full.state_dict())
    assert torch.allclose(full(tokens).embeddings, top(tokens).embeddings, atol=1e-5)


def test_top_k_finds_the_best_words_across_chunks(monkeypatch):
    monkeypatch.setattr("v2flow_cli.tokenizer.vocabulary.VOCAB_CHUNK", 7)
    unit, table = F.normalize(torch.randn(4, 12, dtype=torch.float64), dim=-1), torch.randn(50, 12, dtype=torch.float64)
    unit.requires_grad_()
    lengths = table.norm(dim=-1)
    cosines, index = NearestWords.apply(unit, table, lengths, 3)
    expected = (unit @ F.normalize(table, dim=-1).T).topk(3, -1)
    assert torch.allclose(cosines, expected.values) and torch.equal(index, expected.indices)
    weights = torch.randn(4, 3, dtype=torch.float64)
    (ours,) = torch.autograd.grad((cosines * weights).sum(), unit)
    (theirs,) = torch.autograd.grad((expected.values * weights).sum(), unit)
    assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("generator,top_k", [("tied", 0), ("free", 0), ("free", 5), ("tied", 5)])
def test_pieces_change_neither_values_nor_gradients(generator, top_k, monkeypatch):
    made, module = projection(generator, top_k), "v2flow_cli.tokenizer.vocabulary"

    def run(noise_scale):
        torch.manual_seed(0)
        tokens = torch.randn(2, 6, 16, requires_grad=True)
        out = made(tokens, noise_scale)
        loss = out.embeddings.square().sum() - out.batch_entropy
        gradients = torch.autograd.grad(loss, [tokens, made.generator.weight])
        return out.embeddings, out.mean_entropy, out.batch_entropy, *gradients

    once = run(0.0)
    monkeypatch.setattr(f"{module}.LOGITS_AT_ONCE", 150)  # 50 words: 3 of the 12 tokens at a time
    assert all(torch.allclose(one, two, atol=1e-4) for one, two in zip(once, run(0.0)))
    noisy = run(1.0)
    monkeypatch.setattr(f"{module}.checkpoint", lambda mix, *given, use_reentrant: mix(*given))
    assert all(torch.equal(one, two) for one, two in zip(noisy, run(1.0)))  # computed again with the same noise


@pytest.mark.parametrize("generator,top_k", [("tied", 0), ("free", 0), ("tied", 5)])
def test_mixtures_are_the_same_without_entropies(generator, top_k):
    made, tokens = projection(generator, top_k), torch.randn(1, 4, 16)
    full, quick = made(tokens), made(tokens, entropies=False)
    assert torch.allclose(full.embeddings, quick.embeddings, atol=1e-6)
    assert full.mean_entropy > 0 and quick.mean_entropy == quick.batch_entropy == 0


@pytest.mark.parametrize("generator,top_k", [("tied", 0), ("free", 0), ("tied", 5)])
def test_autocast_gives_the_same_mixtures_to_its_precision(generator, top_k):
    made, tokens = projection(generator, top_k), torch.randn(1, 4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = made(tokens).embeddings.float()
    exact = made(tokens).embeddings
    assert (rough - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_noise_only_with_a_noise_scale():
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
