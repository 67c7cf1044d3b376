"""A test, on a small copy of a causal LM, of whether it can learn to draw.

The copy has random weights, few layers and few words. The test adds rows to its tables, computes a loss with gradients,
and draws images token by token from a key-value cache, with prompts of different lengths in one batch. The tokens must
be those that the training pass, without a cache, gives the highest probability. This fails for models whose earlier
positions attend to later ones, and for an unexpected cache, padding or position ids.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from v2flow_cli.errors import ModelError, foreign_errors, reason_of
from v2flow_cli.llm.caption_contrast import middle_layer
from v2flow_cli.llm.load import OTHER_LLM, check_architecture
from v2flow_cli.llm.loss import IGNORE, labelled_losses
from v2flow_cli.llm.sample import CACHES, DrawingLM
from v2flow_cli.llm.sequences import prompt_ids
from v2flow_cli.llm.vocabulary import VisualVocabulary

WORDS, CODES, LENGTH, LAYERS, WINDOW = 32, 16, 8, 2, 4
PROMPTS = ("\x03", "\x05\x06\x07\x08\x09\x0a")  # each character is the id of a word
PARAMETERS_AT_MOST = 400_000_000  # of the copy; a larger one is not tested
NEAR_TIE = 1e-3  # of the logits' standard deviation: float32 rounds differently with and without a cache


class _SmallDrawingLM(DrawingLM):
    """A DrawingLM of the small copy, whose text tokenizer maps each character to its code."""

    def prompt(self, text: str) -> list[int]:
        return prompt_ids(self.vocabulary, [ord(c) for c in text])


def rehearse(config: Any, name: str, *, contrast: bool = False, checkpointing: bool = False) -> str:
    """The kind of key-value cache, of ``sample.CACHES``, that an LLM with this ``config`` draws with.

    Args:    name, of the LLM, for messages; contrast, True if ``caption_contrast`` is used; checkpointing, of
             activations.
    Raises:  ModelError for an architecture that cannot be built, trained, or draw afterwards, with the reason.
    """
    check_architecture(config, name)
    with foreign_errors(f"llm {name}: cannot be built as a causal LM", OTHER_LLM):
        small = _first_that_builds(small_copies(config))
        if small is None:
            return CACHES[0]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = _build(small)
            for matrix in (p for p in model.parameters() if p.ndim > 1):
                matrix.normal_(std=matrix.shape[-1] ** -0.5)  # else logits hardly depend on the input
    with foreign_errors(f"llm {name}: {type(model).__name__} cannot be trained on token ids alone", OTHER_LLM):
        _train(model, contrast, checkpointing)
    reasons = []
    for kind in CACHES:
        try:
            if _draws_like_training(model.eval(), kind):
                return kind
            reasons.append("with a key-value cache its most likely tokens differ from those in training")
        except Exception as error:
            reasons.append(reason_of(error.__cause__ or error))
    raise ModelError(f"llm {name}: {type(model).__name__} cannot draw token by token ({reasons[-1]}). {OTHER_LLM}")


def small_copies(config: Any) -> Iterator[Any]:
    """``config`` with few words and short windows: once with few layers, once with all."""
    for layers in (LAYERS, None):
        small = copy.deepcopy(config)
        for part in {id(c): c for c in (small, small.get_text_config(decoder=True))}.values():
            depth = getattr(part, "num_hidden_layers", None)
            limits = {"vocab_size": WORDS, "sliding_window": WINDOW}
            if layers and isinstance(depth, int) and depth > layers:
                limits["num_hidden_layers"] = layers
                for key, value in part.to_dict().items():
                    if isinstance(value, list) and len(value) == depth:
                        setattr(part, key, value[-layers:])  # such as the types of the layers; the last differ most
            for key, limit in limits.items():
                if isinstance(value := getattr(part, key, None), int) and value > limit:
                    setattr(part, key, limit)
            for key, value in (("bos_token_id", None), ("eos_token_id", None), ("pad_token_id", 0)):
                if getattr(part, key, None) is not None:
                    setattr(part, key, value)
        yield small


def _first_that_builds(copies: Iterator[Any]) -> Any:
    """The first of ``copies`` that transformers can build; None if it is too large to run.  Raises: its first error."""
    failure: Exception | None = None
    for small in copies:
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in _build(small).parameters())
        except Exception as error:  # such as a number of layers that another setting depends on
            failure = failure or error
        else:
            return small if size <= PARAMETERS_AT_MOST else None
    assert failure is not None
    raise failure


def _build(config: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def _vocabulary(cache: str) -> VisualVocabulary:
    first = WORDS + CODES
    return VisualVocabulary(WORDS, CODES, first, first + 1, LENGTH, "", (1,), (2,), None, cache=cache)


def _train(model: PreTrainedModel, contrast: bool, checkpointing: bool) -> None:
    """New rows, and one forward and backward pass, as in ``training.objectives.drawing``."""
    rows = WORDS + CODES + 2
    model.resize_token_embeddings(rows, mean_resizing=False)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    if None in tables:
        raise ModelError("it has no output table to which tokens can be added")
    if any(len(table.weight) != rows for table in tables):
        raise ModelError("its embedding tables cannot be resized")
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    ids = torch.tensor([[1, 5, 2, WORDS + CODES, *range(WORDS, WORDS + 8)]])
    labels = ids.clone()
    labels[:, :4] = IGNORE
    early = (middle_layer(model), torch.tensor([3])) if contrast else None  # of begin-of-image
    out = labelled_losses(model.train(), tables[1], ids, labels, early)
    out.losses.mean().backward()
    if not torch.isfinite(tables[0].weight.grad).all():
        raise ModelError("its gradients are not finite")
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_disable()


@torch.inference_mode()
def _draws_like_training(model: PreTrainedModel, kind: str) -> bool:
    """True if the tokens drawn with this kind of cache are the most likely ones without a cache."""
    llm = _SmallDrawingLM(model, None, _vocabulary(kind), "")  # type: ignore[arg-type]
    for prompt, token_ids in zip(PROMPTS, llm.generate(PROMPTS, temperature=0.0)):
        prefix = llm.prompt(prompt)
        ids = torch.tensor([[*prefix, *(token_ids + WORDS).tolist()]])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prefix) - 1 : -1, WORDS : WORDS + CODES]
        difference = logits.amax(-1) - logits.gather(1, token_ids[:, None])[:, 0]
        if not (difference <= NEAR_TIE * logits.std()).all():
            return False
    return True
