"""Tiny random LLMs of four families, a text tokenizer for them, and token sets."""

import numpy as np
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
)

from v2flow_cli.llm.vocabulary import VisualVocabulary
from v2flow_cli.recipe.load import load_recipe
from v2flow_cli.store.token_file import save_samples, save_token_ids
from v2flow_cli.store.token_manifest import TokenManifest
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.training.objectives.language_model import train_tokenizer

SENTENCES = [
    "A red fox runs across the green field.",
    "Two dogs play on a beach near the water.",
    "A man in a blue jacket rides a bicycle down the street.",
    "The quick brown fox jumps over the lazy dog; 0123456789!",
]
SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=1, max_position_embeddings=256)
CODES, LENGTH, DIGEST = 64, 4, "0123456789abcdef"


@pytest.fixture(scope="session")
def text_tokenizer():
    return train_tokenizer(SENTENCES * 3, 300)


def make_llm(family: str, words: int):
    """A random LM: llama (untied), qwen (tied, a table beyond the tokenizer), phi (fused layers), mixtral (experts)."""
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(vocab_size=words, tie_word_embeddings=False, **SIZES))
    if family == "qwen":
        return Qwen2ForCausalLM(Qwen2Config(vocab_size=words + 20, tie_word_embeddings=True, **SIZES))
    if family == "mixtral":
        experts = dict(num_local_experts=3, num_experts_per_tok=2)
        return MixtralForCausalLM(MixtralConfig(vocab_size=words, tie_word_embeddings=False, **experts, **SIZES))
    special = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    return Phi3ForCausalLM(Phi3Config(vocab_size=words, tie_word_embeddings=False, **special, **SIZES))


@pytest.fixture(params=["llama", "qwen", "phi", "mixtral"])
def llm(request, text_tokenizer):
    return make_llm(request.param, len(text_tokenizer))


@pytest.fixture
def token_set():
    """The function ``write_token_set(folder, digest, images, length, captions)``."""
    return write_token_set


@pytest.fixture
def vocabulary():
    """After a table of 300 words: visual ids 300 to 363, marks 364 and 365, prompts <bos> caption <newline>."""
    return VisualVocabulary(300, CODES, 364, 365, LENGTH, DIGEST, (0,), (9,), 1)


@pytest.fixture
def llm_folder(tmp_path, text_tokenizer):
    """Maker of saved LLMs: ``llm_folder("qwen")`` is a plain Hugging Face folder."""

    def save(family="llama"):
        folder = tmp_path / family
        make_llm(family, len(text_tokenizer)).save_pretrained(folder)
        text_tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def recipe(tiny_tokenizer_folder, llm_folder, token_set, tmp_path, request):
    """The tiny fine-tuning recipe: a random llama, 12 images of 4 tokens, output in ``tmp_path``/out."""
    digest = V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder).token_digest
    token_set(tmp_path / "tokens", digest=digest)
    root = request.config.rootpath
    settings = [f"llm={llm_folder()}", f"tokenizer={tiny_tokenizer_folder}", f"output={tmp_path / 'out'}"]
    settings.append(f"data.token_sets=[{tmp_path / 'tokens'}]")
    return load_recipe(root / "recipes/tiny/llm.yaml", settings)


def write_token_set(folder, digest=DIGEST, images=12, length=LENGTH, captions=2):
    """A token set as ``encode`` writes it from one tar."""
    ids = np.random.default_rng(0).integers(0, CODES, (images, length))
    save_token_ids(folder / "shard.npy", ids, CODES)
    names = [(f"k{i}", tuple(f"image {i} caption {j}" for j in range(captions))) for i in range(images)]
    save_samples(folder / "shard.npy", names)
    TokenManifest(digest, (32, 32), CODES, length, {"shard": images}).save(folder)
    return ids
