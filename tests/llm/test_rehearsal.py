"""Architectures: which draw, with which cache, and which are refused before a training starts."""

import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from v2flow_cli.errors import ModelError
from v2flow_cli.llm.rehearsal import PARAMETERS_AT_MOST, rehearse

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=101)
HEADS = dict(num_key_value_heads=2, head_dim=8)
NARROW = dict(n_embd=32, n_layer=4, n_head=4, vocab_size=101)
EYES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28)


def config_of(kind, **settings):
    return CONFIG_MAPPING[kind](**settings)


@pytest.mark.parametrize(
    ("cache", "kind", "settings"),
    [
        ("static", "llama", SIZES | HEADS),
        ("static", "gpt2", NARROW),  # learned positions, one matrix for keys, queries and values
        ("static", "gpt_bigcode", NARROW),  # one head of keys and values
        ("static", "gpt_neox", SIZES),
        ("static", "phi", SIZES),  # its output table has a bias
        ("static", "opt", SIZES | dict(ffn_dim=64, word_embed_proj_dim=16)),  # tables narrower than the model
        ("static", "cohere", SIZES | HEADS),  # scales its logits
        ("static", "mixtral", SIZES | HEADS | dict(num_local_experts=3)),
        ("static", "mistral", SIZES | HEADS | dict(sliding_window=8)),
        ("static", "gemma2", SIZES | HEADS | dict(sliding_window=8)),  # every other layer has a window
        ("static", "gpt_oss", SIZES | HEADS | dict(sliding_window=8, num_local_experts=4, num_experts_per_tok=2)),
        ("static", "gemma3n_text", SIZES | HEADS | dict(num_hidden_layers=10)),  # layers that share keys and values
        ("dynamic", "bloom", dict(hidden_size=32, n_layer=4, n_head=4, vocab_size=101)),  # ALiBi
        ("dynamic", "falcon", SIZES | dict(alibi=True, new_decoder_architecture=False)),
        ("dynamic", "gpt_neo", SIZES | dict(num_layers=4, attention_types=[[["global", "local"], 2]], window_size=4)),
    ],
)
def test_architectures_that_draw(cache, kind, settings):
    """A cache counts only where it draws what the training pass finds likeliest; ALiBi counts a static one's slots."""
    config = config_of(kind, **settings)
    before = config.to_dict()
    assert rehearse(config, kind) == cache
    assert config.to_dict() == before


def test_a_multimodal_model_has_its_words_in_a_config_within():
    config = config_of("gemma3", text_config=SIZES | HEADS | dict(sliding_window=8), vision_config=EYES)
    assert not hasattr(config, "vocab_size")
    assert rehearse(config, "gemma3", contrast=True, checkpointing=True) == "static"


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("mamba", dict(hidden_size=32, num_hidden_layers=4, vocab_size=101), "cannot draw token by token"),
        ("rwkv", dict(hidden_size=32, num_hidden_layers=4, vocab_size=101), "cannot draw token by token"),
        ("jamba", SIZES | dict(num_key_value_heads=2, num_hidden_layers=8), "cannot draw token by token"),
        ("openai-gpt", NARROW, "cannot draw token by token"),  # no cache at all
        ("bert", SIZES, "most likely tokens differ from those in training"),  # sees what comes later
        ("roberta", SIZES | dict(is_decoder=True), "most likely tokens differ"),  # positions start at the pad id
        ("bart", dict(d_model=32, vocab_size=101), "a bart is an encoder-decoder; expected a decoder-only model"),
        ("t5", dict(d_model=32, vocab_size=101), "a t5 is an encoder-decoder"),
        ("llava", {}, "a model of type llava, for which transformers has no text-only causal LM"),
        ("clip", {}, "a model of type clip, for which transformers has no text-only causal LM"),
    ],
)
def test_architectures_that_cannot_draw(kind, settings, reason):
    with pytest.raises(ModelError, match=f"^llm here: .*{reason}") as caught:
        rehearse(config_of(kind, **settings), "here")
    assert "Take another causal LM" in str(caught.value) and len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_layers_that_caption_contrast_needs():
    with pytest.raises(ModelError, match="caption_contrast needs its list of layers"):
        rehearse(config_of("gpt2", **NARROW), "here", contrast=True)


def test_a_very_wide_model_is_not_built(monkeypatch):
    built = []
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_config",
        lambda config, _whole=AutoModelForCausalLM.from_config, **k: built.append(_whole(config, **k)) or built[-1],
    )
    assert rehearse(config_of("llama", hidden_size=16384, intermediate_size=53248), "405b") == "static"
    assert [model.device.type for model in built] == ["meta"] and built[0].num_parameters() > PARAMETERS_AT_MOST
