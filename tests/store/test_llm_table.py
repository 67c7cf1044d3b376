"""The word table of each family of LLMs: tied and untied, in one file and in shards, larger than its text tokenizer."""

import json

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from v2flow_cli.errors import ModelError
from v2flow_cli.store.llm_table import load_vocab_embeddings, vocab_shape
from v2flow_cli.training.objectives.language_model import train_tokenizer

SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
FAMILIES = {
    "llama 2": (LlamaForCausalLM, LlamaConfig, {}),
    "llama 3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
    "qwen 2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen 3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
    "phi 3": (Phi3ForCausalLM, Phi3Config, {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 2, "num_experts_per_tok": 1}),
}


@pytest.fixture(scope="module")
def text_tokenizer():
    return train_tokenizer(["A red fox runs across the green field, 0123456789!"] * 3, 290)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_of_every_family(family, tied, tmp_path, text_tokenizer):
    words = len(text_tokenizer)
    model_class, config_class, more = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(vocab_size=words + 30, tie_word_embeddings=tied, **SIZES, **more))
    model.save_pretrained(tmp_path, max_shard_size="20KB" if family == "llama 2" else "5GB")
    text_tokenizer.save_pretrained(tmp_path)
    table = load_vocab_embeddings(str(tmp_path))
    assert torch.equal(table, model.get_input_embeddings().weight[:words])  # rows beyond the tokenizer mean nothing
    assert vocab_shape(str(tmp_path)) == (words, 16)
    assert (tmp_path / "model.safetensors.index.json").exists() == (family == "llama 2")


def test_a_low_precision_table_is_read_in_float32(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **SIZES)).bfloat16()
    model.save_pretrained(tmp_path)
    table = load_vocab_embeddings(str(tmp_path))
    assert table.dtype == torch.float32 and table.shape == (40, 16)  # without a text tokenizer all rows are words


def test_an_llm_that_draws_gives_its_words_alone(tmp_path, text_tokenizer):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=340, **SIZES))
    model.config.v2flow = {"visual_token_offset": 300}
    model.save_pretrained(tmp_path)
    text_tokenizer.save_pretrained(tmp_path)
    assert torch.equal(load_vocab_embeddings(str(tmp_path)), model.get_input_embeddings().weight[:300])


@pytest.mark.parametrize(("file", "text"), [("config.json", "{"), ("config.json", "[1]"), ("tokenizer.json", "{}")])
def test_a_damaged_folder_is_refused(file, text, tmp_path):
    LlamaForCausalLM(LlamaConfig(vocab_size=40, **SIZES)).save_pretrained(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(ModelError, match="the embedding table cannot be read"):
        vocab_shape(str(tmp_path))


def test_a_folder_without_a_table_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="no embedding table found"):
        load_vocab_embeddings(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": "gone"}}))
    with pytest.raises(ModelError, match="the embedding table cannot be read"):
        vocab_shape(str(tmp_path))
