"""An LLM before it learns to draw: checked without its weights, and its trained weights selected."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from v2flow_cli.errors import ModelError
from v2flow_cli.llm.load import context_length, load_config
from v2flow_cli.llm.rehearsal import rehearse
from v2flow_cli.llm.sequences import prompt_frame
from v2flow_cli.llm.vocabulary import VisualVocabulary, check_extendable
from v2flow_cli.recipe.schema import FinetuneRecipe, Lora
from v2flow_cli.runtime.extras import extra
from v2flow_cli.tokenizer import V2FlowTokenizer


@dataclass(frozen=True)
class CheckedLLM:
    """An LLM without its weights."""

    config: Any
    text_tokenizer: PreTrainedTokenizerBase
    vocabulary: VisualVocabulary | None  # of an LLM that already draws, whose rows are trained further
    prefix: tuple[int, ...]  # ids before the caption
    suffix: tuple[int, ...]  # and after it
    longest: int  # tokens of a sample
    cache: str  # the kind of its key-value cache


def check_llm(recipe: FinetuneRecipe, image_tokenizer: V2FlowTokenizer, length: int) -> CheckedLLM:
    """``recipe.llm`` without its weights, if it can learn to draw images of ``length`` tokens.

    Raises:  ModelError if its architecture, text tokenizer, chat template or context does not allow it.
    """
    config, text_tokenizer = load_config(recipe.llm)
    checkpointing = recipe.train.gradient_checkpointing
    cache = rehearse(config, recipe.llm, contrast=bool(recipe.caption_contrast), checkpointing=checkpointing)
    vocabulary = None
    if recipe.new_rows == "kept":
        vocabulary = _kept_vocabulary(config, recipe, image_tokenizer)
        prefix, suffix = vocabulary.prompt_prefix, vocabulary.prompt_suffix
    else:
        check_extendable(text_tokenizer)
        prefix, suffix = prompt_frame(text_tokenizer)
    frame = len(prefix) + len(suffix)
    longest = check_context(config, frame, recipe.data.max_caption_tokens, length)
    return CheckedLLM(config, text_tokenizer, vocabulary, prefix, suffix, longest, cache)


def _kept_vocabulary(config: Any, recipe: FinetuneRecipe, image_tokenizer: V2FlowTokenizer) -> VisualVocabulary:
    """The vocabulary of an LLM that draws.  Raises: ModelError if it does not, or draws another tokenizer's tokens."""
    vocabulary = VisualVocabulary.of(config, recipe.llm)
    vocabulary.check_tokenizer(image_tokenizer.token_digest, recipe.llm, "--set tokenizer=FOLDER")
    return vocabulary


def check_context(config: Any, frame: int, caption_tokens: int, image_tokens: int) -> int:
    """Tokens of the longest sample.  Raises: ModelError if it does not fit the LLM's positions.

    Args:  frame, tokens of the chat template around a caption.
    """
    longest, limit = frame + 3 + caption_tokens + image_tokens, context_length(config)  # the two marks and EOS
    if longest > limit:
        raise ModelError(
            f"a sample takes up to {longest} tokens ({caption_tokens} of caption, {image_tokens} of image), but the "
            f"LLM's context is {limit}. Lower data.max_caption_tokens, or use another LLM."
        )
    return longest


def choose_trained(model: PreTrainedModel, mode: str, lora: Lora | None, offset: int) -> Any:
    """``model`` with only the weights of ``mode`` trainable; for lora, the peft model around it."""
    if mode == "full":
        return model
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embed.weight is head.weight
    if mode == "rows":
        model.requires_grad_(False)
        for weight in {id(w): w for w in (embed.weight, head.weight)}.values():
            weight.requires_grad_(True)
            weight.register_hook(functools.partial(_only_new_rows, offset=offset))
        return model
    assert lora is not None
    with extra("lora", "peft", "mode: lora"):
        from peft import LoraConfig, get_peft_model
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    rows = list(range(offset, embed.weight.shape[0]))
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        trainable_token_indices={names[id(module)]: rows for module in ([embed] if tied else [embed, head])},
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _only_new_rows(gradient: Tensor, offset: int) -> Tensor:
    gradient = gradient.clone()
    gradient[:offset] = 0
    return gradient
