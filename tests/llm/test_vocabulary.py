import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from v2flow_cli.errors import ModelError
from v2flow_cli.llm.sequences import caption_ids
from v2flow_cli.llm.vocabulary import VisualVocabulary, add_visual_tokens, extend_tables


def tables(model):
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


def test_existing_rows_stay_and_new_ones_have_their_scale(llm, text_tokenizer):
    before = [table.detach().clone() for table in tables(llm)]
    codebook = torch.nn.functional.normalize(torch.randn(64, 16), dim=1)
    words = len(text_tokenizer)
    extend_tables(llm, words, 64, codebook, seed=0)
    for old, new in zip(before, tables(llm)):
        assert len(new) == len(old) + 66
        assert torch.equal(new[: len(old)], old)
        text, rows = old[:words], new[len(old) : -2].detach()
        assert torch.allclose(rows.mean(0), text.mean(0), atol=1e-6)
        spread = [(t - t.mean(0)).pow(2).sum(1).mean().sqrt() for t in (text, rows)]
        assert torch.allclose(*spread, rtol=1e-5)
        ratio = (rows - rows.mean(0)) / (codebook - codebook.mean(0))  # the codebook itself, scaled
        assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-3)
    assert llm.config.vocab_size == len(before[0]) + 66
    tied = llm.config.tie_word_embeddings
    assert tied == (tables(llm)[0] is tables(llm)[1])


def test_codebook_of_another_width_keeps_its_angles(llm, text_tokenizer):
    codebook = torch.randn(64, 8)
    line = extend_tables(llm, len(text_tokenizer), 64, codebook, seed=0)
    assert "from width 8 to 16" in line
    rows = tables(llm)[0][-66:-2].detach()
    gram = [centred @ centred.T for centred in (codebook - codebook.mean(0), rows - rows.mean(0))]
    cosine = torch.nn.functional.cosine_similarity(gram[0].flatten(), gram[1].flatten(), dim=0)
    assert cosine > 0.9999


def test_saved_folder_loads_without_this_package(llm, text_tokenizer, vocabulary, tmp_path):
    offset = len(tables(llm)[0])
    extend_tables(llm, len(text_tokenizer), 64, None, seed=0)
    llm.config.v2flow = vocabulary.record()
    llm.save_pretrained(tmp_path)
    add_visual_tokens(text_tokenizer, offset, 64).save_pretrained(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = torch.tensor([[0, 5, offset, offset + 63, offset + 64]])
    assert torch.equal(model(ids).logits, llm.eval()(ids).logits)
    names = "<|v2flow:v_0|><|v2flow:v_63|><|v2flow:boi|><|v2flow:eoi|>"
    assert tokenizer.decode([offset, offset + 63, offset + 64, offset + 65]) == names
    assert VisualVocabulary.of(model.config, "here") == vocabulary


def test_unusual_captions_have_no_visual_or_special_id(text_tokenizer):
    extended = add_visual_tokens(text_tokenizer, 320, 64)  # 20 spare rows, as in Qwen
    pieces = ["<|v2flow:v_7|>", "<|v2flow:boi|>", "<|v2flow:eoi|>", "<|v2flow:spare_301|>", "<|bos|>", "<|eos|>"]
    pieces += ["<|v2flow:v_", "63|>", "▁", "Ġ", "\x00", "\ud7ff", "狐", "🦊", " ", "\t", "<", "|>", "v_1", "a fox"]
    generator = torch.Generator().manual_seed(0)
    captions = [*pieces, "".join(pieces), "<|v2flow:v_7|>" * 500]
    for _ in range(10_000):
        chosen = torch.randint(len(pieces), (6,), generator=generator)
        captions.append("".join(pieces[i] for i in chosen))
    for caption in captions:
        ids = caption_ids(extended, caption)
        assert all(2 < i < 300 for i in ids), caption
        assert extended.decode(ids).split() == caption.split()
        assert all(i < 300 for i in extended(caption)["input_ids"])  # nor by any other way of reading text


def test_refuses_an_llm_that_draws_already(text_tokenizer):
    extended = add_visual_tokens(text_tokenizer, 300, 64)
    with pytest.raises(ModelError, match="visual tokens already"):
        add_visual_tokens(extended, 400, 64)


def test_refuses_a_config_without_record(llm):
    with pytest.raises(ModelError, match=r"some/folder: its config\.json lists no visual tokens.*finetune-llm"):
        VisualVocabulary.of(llm.config, "some/folder")
