"""A causal LM and its text tokenizer from a folder or the hub."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from v2flow_cli.errors import ModelError, foreign_errors
from v2flow_cli.runtime.hub import SETTINGS, model_folder

OTHER_LLM = "Take another causal LM, such as a Llama, Qwen, Mistral, Gemma or GPT-NeoX."


def loading(name: str) -> AbstractContextManager[None]:
    """Turn the errors of transformers for a folder or hub id without a causal LM into a ModelError."""
    return foreign_errors(
        f"llm {name}: cannot be loaded as a causal LM",
        "Give a Hugging Face model folder or hub id; recipes/default/lm.yaml trains one.",
    )


def load_config(name: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """Config and text tokenizer of the LLM in a folder or on the hub, without its weights.  Raises: ModelError."""
    folder = model_folder(name, SETTINGS)
    with loading(name):  # trust_remote_code=False: code in a model folder is never run, and no prompt asks for it
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return config, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def check_architecture(config: Any, name: str) -> None:
    """Raises: ModelError for an encoder-decoder, and for a type that transformers has no causal LM of."""
    if getattr(config, "is_encoder_decoder", False):
        kind = f"a {config.model_type} is an encoder-decoder"
        raise ModelError(f"llm {name}: {kind}; expected a decoder-only model. {OTHER_LLM}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"llm {name}: a model of type {config.model_type}, for which transformers has no text-only causal LM. "
            f"{OTHER_LLM}"
        )


def load_llm(name: str, dtype: torch.dtype, **hub: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM and its text tokenizer from a folder or hub id.

    Args:    hub, as ``runtime.hub.model_folder`` takes it.
    Raises:  ModelError.
    """
    disable_progress_bar()
    folder = model_folder(name, **hub)
    with loading(name):
        check_architecture(AutoConfig.from_pretrained(folder, trust_remote_code=False), name)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
        return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def without_tied(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``weights`` by the names in ``model.state_dict()``, each tied table once."""
    kept = dict(weights)
    for copy, source in model.all_tied_weights_keys.items():
        if copy in kept and source in kept and torch.equal(kept[copy], kept[source]):
            del kept[copy]
    return kept


def context_length(config: Any) -> float:
    """The most positions of the LLM; infinite if its config names none."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf
