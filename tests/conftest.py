"""Fixtures that every room's tests share: tiny models with random weights, and the sample photos."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from v2flow_cli.assets import sample_photos

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
STAGES = sorted(path for path in RECIPES.rglob("*.yaml") if "kind: budget" not in path.read_text(encoding="utf-8"))
torch.set_num_threads(min(2, torch.get_num_threads()))
# The first backward pass decides whether autograd has threads, which a fork (tests/reliability) does not survive. It
# would have some if a test with fake tensors of a GPU came first.
torch.ones(1, requires_grad=True).sum().backward()
# No test asserts a time. Each run has the same examples; `pytest --hypothesis-profile search` looks for new ones.
settings.register_profile("v2flow", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None)
settings.load_profile("v2flow")


def build_tiny_tokenizer():
    """A V2FlowTokenizer with random weights: 32 px images are 4 tokens of 64 codes; 300 LLM words of width 32."""
    from v2flow_cli.recipe import load_recipe
    from v2flow_cli.tokenizer import V2FlowTokenizer
    from v2flow_cli.training.objectives.tokenizer import build_config

    torch.manual_seed(0)
    recipe = load_recipe(RECIPES / "tiny" / "tokenizer.yaml", ["image_size=32"])
    autoencoder = {
        "class": "V2FlowAutoencoder",
        "latent_channels": 4,
        "encoder_width": 16,
        "encoder_depth": 1,
        "decoder_width": 16,
        "decoder_depth": 1,
        "scaling_factor": 2.0,
        "shift_factor": 0.1,
    }
    model = V2FlowTokenizer(build_config(recipe, autoencoder, (300, 32)))
    model.vocabulary.set_table(0.02 * torch.randn(300, 32) + 0.01)
    # The modulations start at zero; random ones let tests see every input act.
    for layer in (model.flow.modulate_context, model.flow.modulate_time, model.flow.out):
        torch.nn.init.normal_(layer.weight, std=0.1)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tokenizer"
    build_tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_tokenizer():
    return build_tiny_tokenizer()


@pytest.fixture(scope="session")
def sample_images() -> list:
    return [image for _, image in sample_photos()]
