"""A causal LM and its text tokenizer from a folder or the hub."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from v2flow_cli.errors import ModelError
from v2flow_cli.runtime.hub import model_folder


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Turns what transformers raises for a folder or hub id that is no causal LM into a ModelError."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"llm {name}: cannot be loaded as a causal LM ({reason}). Give a Hugging Face model folder or hub id; "
            "recipes/default/lm.yaml makes one."
        ) from error


def load_llm(name: str, dtype: torch.dtype, **hub: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM and its text tokenizer from a folder or hub id.

    Args:    hub, as ``runtime.hub.model_folder`` takes it.
    Raises:  ModelError.
    """
    disable_progress_bar()
    folder = model_folder(name, **hub)
    with loading(name):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)


def context_length(config: Any) -> float:
    """Positions that the LLM was made for; infinite where its config does not say."""
    return getattr(config, "max_position_embeddings", None) or math.inf
