import contextlib
from dataclasses import replace

import pytest
import torch

from v2flow_cli.errors import DataError, ModelError
from v2flow_cli.llm.sample import STOPPED, DrawingLM, ImageTokensOnly, pick
from v2flow_cli.llm.static_step import StaticStep
from v2flow_cli.llm.vocabulary import VisualVocabulary, add_visual_tokens, extend_tables
from v2flow_cli.runtime.batch_invariant import each_row_alone


@pytest.fixture
def drawing(llm, text_tokenizer, vocabulary):
    """An untrained LLM with 64 visual tokens, whose logits are spread so that draws differ."""
    offset = llm.get_input_embeddings().weight.shape[0]
    extend_tables(llm, len(text_tokenizer), 64, torch.randn(64, 16), seed=0)
    moved = dict(visual_token_offset=offset, begin_image_id=offset + 64, end_image_id=offset + 65)
    vocabulary = replace(vocabulary, tokens_per_image=12, **moved)
    with torch.no_grad():
        llm.get_output_embeddings().weight[offset:] *= 8
    llm.config.v2flow = vocabulary.record()
    llm.eval()
    return llm, add_visual_tokens(text_tokenizer, offset, 64), vocabulary


@pytest.fixture
def drawing_lm(drawing, tmp_path):
    model, tokenizer, _ = drawing
    model.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    return DrawingLM.from_pretrained(tmp_path / "llm")


PROMPTS = ["a red fox", "two dogs on a beach near the water", "a red fox", "", "a red fox " * 8]


def draw(drawing_lm, rows, **settings):
    settings = dict(seeds=[s for _, s in rows], temperature=1.0) | settings
    return drawing_lm.generate([PROMPTS[p] for p, _ in rows], **settings)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_a_row_does_not_depend_on_its_batch(drawing_lm, guidance_scale):
    rows = [(0, 5), (1, 5), (4, 5), (2, 6), (0, 7)]
    together = draw(drawing_lm, rows, guidance_scale=guidance_scale)
    assert together.shape == (5, 12) and together.min() >= 0 and together.max() < 64
    for row, alone in zip(rows, together):
        assert torch.equal(draw(drawing_lm, [row], guidance_scale=guidance_scale)[0], alone)
    assert len({tuple(row.tolist()) for row in together}) > 1


def test_fixed_tokens_stay_and_condition_later_ones(drawing_lm):
    plain = draw(drawing_lm, [(0, 1), (1, 2)])
    fixed = torch.full((2, 12), STOPPED)
    assert torch.equal(draw(drawing_lm, [(0, 1), (1, 2)], fixed_ids=fixed), plain)
    fixed[:, 3] = (plain[:, 3] + 1) % 64
    changed = draw(drawing_lm, [(0, 1), (1, 2)], fixed_ids=fixed)
    assert torch.equal(changed[:, :3], plain[:, :3]) and torch.equal(changed[:, 3], fixed[:, 3])
    assert not torch.equal(changed[:, 4:], plain[:, 4:])
    assert torch.equal(draw(drawing_lm, [(0, 9), (1, 9)], fixed_ids=changed), changed)


def test_guidance_is_the_formula_and_1_is_none(drawing_lm):
    plain = draw(drawing_lm, [(0, 1), (1, 2)])
    assert torch.equal(plain, draw(drawing_lm, [(0, 1), (1, 2)], guidance_scale=1.0))
    unguided = draw(drawing_lm, [(3, 1)], temperature=0.0)
    assert torch.equal(draw(drawing_lm, [(0, 1)], guidance_scale=0.0, temperature=0.0), unguided)
    assert not torch.equal(draw(drawing_lm, [(0, 1)], guidance_scale=20.0), plain[:1])


def test_greedy_equals_generate_with_the_logits_processor(drawing_lm, drawing):
    model, _, vocabulary = drawing
    prompts = [drawing_lm.prompt(text) for text in PROMPTS]
    width = max(map(len, prompts))
    ids = torch.tensor([[2] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=14,
        do_sample=False,
        logits_processor=[ImageTokensOnly(vocabulary, width)],
        eos_token_id=1,
        pad_token_id=2,
    )[:, width:]
    assert out[:, 12].tolist() == [vocabulary.end_image_id] * 5 and out[:, 13].tolist() == [1] * 5
    mine = drawing_lm.generate(PROMPTS, seeds=[0] * 5, temperature=0.0)
    assert torch.equal(out[:, :12] - vocabulary.visual_token_offset, mine)


def test_200_constrained_generations_have_only_allowed_ids(drawing_lm, drawing):
    model, _, vocabulary = drawing
    prompt = torch.tensor([drawing_lm.prompt("a red fox")] * 200)
    torch.manual_seed(0)
    out = model.generate(
        prompt,
        max_new_tokens=14,
        do_sample=True,
        temperature=5.0,
        logits_processor=[ImageTokensOnly(vocabulary, prompt.shape[1])],
        eos_token_id=1,
        pad_token_id=2,
    )[:, prompt.shape[1] :]
    assert vocabulary.is_visual(out[:, :12]).all() and (out[:, 12] == vocabulary.end_image_id).all()
    assert (out[:, 13] == 1).all() and out.shape[1] == 14


def test_pick_draws_the_distribution_and_respects_its_cuts():
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    uniforms = (torch.arange(1000) + 0.5) / 1000

    def shares(temperature=1.0, top_k=0, top_p=1.0):
        heat = torch.full((1000,), temperature)
        drawn = pick(scores.expand(1000, 4), uniforms.double(), heat, top_k, top_p)
        return (drawn.bincount(minlength=4) / 1000).tolist()

    assert shares() == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=2e-3)
    assert shares(temperature=0.0) == [0, 0, 0, 1]
    assert shares(temperature=0.5) == pytest.approx([1 / 30, 4 / 30, 9 / 30, 16 / 30], abs=2e-3)
    assert shares(top_k=2) == pytest.approx([0, 0, 3 / 7, 4 / 7], abs=2e-3)
    assert shares(top_p=0.75) == pytest.approx([0, 2 / 9, 3 / 9, 4 / 9], abs=2e-3)
    assert shares(top_p=0.7) == pytest.approx([0, 0, 3 / 7, 4 / 7], abs=2e-3)


def test_a_prompt_that_is_too_long_names_the_limit(drawing_lm):
    with pytest.raises(DataError, match=r"has [\d,]+ tokens; .*llm has room for 239 beside the image"):
        drawing_lm.prompt("fox " * 2500)


def test_an_llm_that_cannot_draw_is_refused(llm_folder, tmp_path):
    with pytest.raises(ModelError, match="lists no visual tokens"):
        DrawingLM.from_pretrained(llm_folder())
    with pytest.raises(ModelError, match="cannot be loaded as a causal LM"):
        DrawingLM.from_pretrained(tmp_path)
    record = VisualVocabulary(300, 64, 364, 365, 4, "d", (), (), None).record()
    assert record.pop("codebook_size") == 64
    with pytest.raises(ModelError, match="lists no visual tokens"):
        VisualVocabulary.of(type("Config", (), {"v2flow": record}), "here")


@pytest.fixture
def one_thread():
    """Rows are shared out over torch's threads; on one, they are computed in one batch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_samples_of_one_prompt_share_its_prefill(drawing_lm, one_thread, monkeypatch):
    shapes, forward = [], drawing_lm.model.forward

    def recorded(**given):
        shapes.append((tuple(given["input_ids"].shape), type(given["past_key_values"]).__name__))
        return forward(**given)

    monkeypatch.setattr(drawing_lm.model, "forward", recorded)
    draw(drawing_lm, [(0, 1), (0, 2), (0, 3), (1, 1)], guidance_scale=2.0)
    # Two prompts and the empty one are read once each; then four pictures go on, each with and without its prompt.
    assert shapes == [*[((1, 32), "StaticCache")] * 3, *[((8, 1), "StaticCache")] * 11]
    shapes.clear()
    drawing_lm.generate(["a red fox", "a red fox " * 8], seeds=[1, 1])
    assert sorted(set(shape for shape, _ in shapes)) == [(1, 1), (1, 32), (1, 64)]  # widths are not mixed


@pytest.fixture
def flexible(drawing, drawing_lm):
    """The same LLM, free to stop after 1 to 12 ids, and likely to."""
    model, _, vocabulary = drawing
    vocabulary = replace(vocabulary, flexible=True)
    for llm in (model, drawing_lm.model):
        with torch.no_grad():
            llm.get_output_embeddings().weight[vocabulary.end_image_id] *= 20
    drawing_lm.vocabulary = vocabulary
    return model, drawing_lm, vocabulary


def test_pictures_of_flexible_length_have_1_to_the_maximum_of_ids(flexible):
    model, drawing_lm, vocabulary = flexible
    rows = [(0, seed) for seed in range(40)]
    drawn = draw(drawing_lm, rows)
    lengths = (drawn != STOPPED).sum(1)
    assert lengths.min() >= 1 and len(set(lengths.tolist())) > 1
    for row, length in zip(drawn, lengths):
        assert (row[:length] >= 0).all() and (row[:length] < 64).all() and (row[length:] == STOPPED).all()
    assert torch.equal(draw(drawing_lm, rows[7:8])[0], drawn[7])

    prompt = torch.tensor([drawing_lm.prompt("a red fox")] * 60)
    torch.manual_seed(0)
    out = model.generate(
        prompt,
        max_new_tokens=14,
        do_sample=True,
        logits_processor=[ImageTokensOnly(vocabulary, prompt.shape[1])],
        eos_token_id=1,
        pad_token_id=2,
    )[:, prompt.shape[1] :]
    counts = set()
    for row in out.tolist():
        count = row.index(vocabulary.end_image_id)
        counts.add(count)
        assert 1 <= count <= 12 and vocabulary.is_visual(torch.tensor(row[:count])).all()
        assert row[count + 1] == 1 and set(row[count + 2 :]) <= {2}
    assert len(counts) > 1


def test_a_shorter_picture_is_the_beginning_of_the_long_one(flexible):
    _, drawing_lm, _ = flexible
    rows = [(0, seed) for seed in range(20)]
    whole = draw(drawing_lm, rows)
    for count in (1, 5, 12):
        short = draw(drawing_lm, rows, num_tokens=count)
        assert short.shape == (20, count) and torch.equal(short, whole[:, :count])
    assert (whole[:, 4] == STOPPED).any()  # those that end by themselves still do
    for count in (0, 13):
        with pytest.raises(DataError, match=rf"{count} tokens, but .* draws 1 to 12"):
            draw(drawing_lm, rows, num_tokens=count)


def test_an_llm_of_one_length_draws_no_other(drawing_lm):
    assert draw(drawing_lm, [(0, 1)], num_tokens=12).shape == (1, 12)
    with pytest.raises(DataError, match=r"5 tokens, but .* always draws 12"):
        draw(drawing_lm, [(0, 1)], num_tokens=5)


def test_captions_have_no_visual_id(drawing_lm, drawing):
    with pytest.raises(ModelError, match="was not trained to caption"):
        drawing_lm.caption(torch.zeros(12, dtype=torch.long))
    drawing_lm.vocabulary = replace(drawing_lm.vocabulary, captions=True)
    ids = torch.arange(12)
    texts = [drawing_lm.caption(ids, seed=s, temperature=2.0, max_tokens=20) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and not any("v2flow" in text for text in texts)
    assert drawing_lm.caption(ids, max_tokens=20) == drawing_lm.caption(ids, seed=5, max_tokens=20)


@pytest.mark.parametrize("llm", ["llama"], indirect=True)
def test_the_compiled_step_draws_the_same(drawing_lm, monkeypatch):
    """One graph for all positions, and the tensors of the first drawing again for the second.

    The layers of a CPU are replaced once, around both drawings, because torch 2.11 compiles again for new ones.
    """
    rows, threads = [(0, 5), (2, 6), (0, 7)], torch.get_num_threads()
    settings = dict(guidance_scale=2.0)
    plain = [draw(drawing_lm, rows, **settings), draw(drawing_lm, rows[::-1], **settings)]
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    drawing_lm._static_step = StaticStep(drawing_lm.model, backend=backend)
    try:
        torch.set_num_threads(1)
        with each_row_alone(drawing_lm.model):
            monkeypatch.setattr("v2flow_cli.llm.sample.each_row_alone", lambda model: contextlib.nullcontext())
            compiled = [draw(drawing_lm, rows, **settings), draw(drawing_lm, rows[::-1], **settings)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.stack(plain), torch.stack(compiled))
    assert len(graphs) == 1


def test_the_digest_is_of_the_weights_as_they_are(drawing_lm, tmp_path):
    """Also if the config has another one; the weights' type does not matter if it represents them exactly."""
    drawing_lm.model.config.v2flow["weights_digest"] = "0" * 16
    before = drawing_lm.digest
    assert DrawingLM.from_pretrained(tmp_path / "llm").digest == before != "0" * 16
    rounded = DrawingLM.from_pretrained(tmp_path / "llm", dtype=torch.bfloat16)
    assert rounded.digest != before
    rounded.model.float()
    assert rounded.digest == DrawingLM.from_pretrained(tmp_path / "llm", dtype=torch.bfloat16).digest
    with torch.no_grad():
        drawing_lm.model.get_input_embeddings().weight[0, 0] += 1
    assert drawing_lm.digest != before


def test_the_embedded_llm_has_the_digest_that_its_training_wrote():
    llm = DrawingLM.from_pretrained()
    assert llm.digest == llm.model.config.v2flow["weights_digest"]
