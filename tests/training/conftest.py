"""A small world to train in: photos, a tiny autoencoder, a tiny LM, and recipes that point at them."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from v2flow_cli.recipe import load_recipe
from v2flow_cli.tokenizer.autoencoder import V2FlowAutoencoder, V2FlowAutoencoderConfig

from ..conftest import RECIPES

#: Overrides of the tiny tokenizer: FlexTok's parts.
TRANSFORMER = (
    "context=null",
    "vocabulary.llm=none",
    "quantizer={kind: fsq, levels: [4, 4, 4], usage_floor: 0.0}",
    "resampler={kind: registers, hidden_size: 32, depth: 1, num_heads: 2, mlp_ratio: 2.0, dropout: 0.0, patch_size: 2, "
    "max_tokens: 8, places: spread, causal: true, nested_dropout: power_of_two}",
    "flow={kind: transformer, formulation: rectified_flow, hidden_size: 32, token_depth: 1, depth: 1, num_heads: 2, "
    "mlp_ratio: 2.0, dropout: 0.0, time_shift: 3.0, repeats: 1}",
    "sampling.num_mask_steps=1",
)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with photos, a tiny autoencoder and a tiny LM, and the overrides that point a recipe at them."""
    from v2flow_cli.assets import sample_photos

    root = tmp_path_factory.mktemp("world")
    (root / "photos").mkdir()
    for name, image in sample_photos():
        image.resize((96, 80)).save(root / "photos" / f"{name}.png")
    torch.manual_seed(0)
    sizes = {"encoder_width": 16, "encoder_depth": 1, "decoder_width": 16, "decoder_depth": 1}
    V2FlowAutoencoder(V2FlowAutoencoderConfig(latent_channels=4, scaling_factor=2.0, **sizes)).save_pretrained(
        root / "ae"
    )
    llm = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(llm).save_pretrained(root / "lm")
    return root


def recipe(world, name, output, *more):
    sources = [f"data.sources=[{world / 'photos'}]", f"output={output}"]
    if name == "tokenizer":
        sources += [f"latents.autoencoder={world / 'ae'}", f"vocabulary.llm={world / 'lm'}"]
    return load_recipe(RECIPES / "tiny" / f"{name}.yaml", [*sources, *more])


def quiet(message):
    pass
