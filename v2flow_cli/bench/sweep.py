"""Sweeps: the settings at which a model is measured.  ``cfg=1,2,3`` and ``solver=euler,heun`` are six settings."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

from v2flow_cli.errors import DataError
from v2flow_cli.recipe.schema import SAMPLING_OPTIONS, Sampling
from v2flow_cli.tokenizer import V2FlowTokenizer

TOKENS, DECODER, REFINE = "tokens", "decoder", "refine"


@dataclass(frozen=True)
class Setting:
    """One way to encode and decode.

    values: keyword arguments of ``decode``; tokens: of each image; decoder: its name; refine_steps: of
    ``encode``, which then finds the ids for this number of tokens (None: the model's).
    """

    label: str = ""  # "" without a sweep
    values: Mapping[str, Any] = field(default_factory=dict)
    tokens: int | None = None
    decoder: str | None = None  # None: with each decoder that a model has
    refine_steps: int | None = None

    def name(self, model: str) -> str:
        return f"{model}, {self.label}" if self.label else model


def _read(field: str, text: str) -> Any:
    """A value of a field of ``Sampling``, a decoder's name, or a number of tokens or steps.  Raises: ValueError."""
    if field == DECODER:
        return text
    hint = int if field in (TOKENS, REFINE) else get_type_hints(Sampling)[field]
    if choices := get_args(hint):
        if text not in choices:
            raise ValueError(f"expected {', '.join(choices)}")
        return text
    least = 1 if hint is int and field != REFINE else 0  # counts start at 1, factors at 0
    try:
        value = hint(text)
    except ValueError:
        value = None
    if value is None or not least <= value < 1_000_000:
        raise ValueError(f"expected {'whole numbers' if hint is int else 'numbers'} from {least} on")
    return value


#: The keys of ``--sweep``, and the arguments of ``decode`` that they set.
KEYS = {TOKENS: TOKENS, DECODER: DECODER, REFINE: REFINE, **SAMPLING_OPTIONS, "temperature": SAMPLING_OPTIONS["noise"]}


def parse_sweeps(texts: Sequence[str], fixed: Mapping[str, Any] | None = None) -> list[Setting]:
    """Every combination of the ``KEY=V1,V2`` in ``texts``, the first key slowest; one empty setting without any.

    Args:    fixed, values that all settings share; None takes the model's value.
    Raises:  ValueError for an unknown key or value, and for a repeated key.
    """
    base = {key: value for key, value in (fixed or {}).items() if value is not None}
    arguments_set = set(base)
    axes: list[list[tuple[str, str, Any]]] = []
    for text in texts:
        key, equals, values = text.partition("=")
        if key not in KEYS or not equals:
            raise ValueError(f"{text}: expected KEY=V1,V2,... with KEY one of {', '.join(KEYS)}")
        argument = KEYS[key]
        if argument in arguments_set:
            raise ValueError(f"{text}: {key} is set twice")
        arguments_set.add(argument)
        try:
            axis = [(f"{key} {value.strip()}", argument, _read(argument, value.strip())) for value in values.split(",")]
        except ValueError as error:
            raise ValueError(f"{text}: {error}") from None
        if len({value for _, _, value in axis}) < len(axis):
            raise ValueError(f"{text}: expected different values")
        axes.append(axis)
    settings = []
    for point in itertools.product(*axes):
        arguments = {**base, **{argument: value for _, argument, value in point}}
        tokens, decoder = arguments.pop(TOKENS, None), arguments.pop(DECODER, None)
        refine_steps = arguments.pop(REFINE, None)
        settings.append(Setting(", ".join(label for label, _, _ in point), arguments, tokens, decoder, refine_steps))
    return settings


def settings_of_models(
    models: Mapping[str, V2FlowTokenizer], size: int, settings: Sequence[Setting]
) -> list[tuple[str, Setting]]:
    """Every (model, setting) to measure at ``size`` pixels.

    A flexible tokenizer decodes any prefix. Another one is measured only at its own lengths, so that several of them
    are the rows of one sweep; likewise with decoders. Without a decoder in the setting, a model is measured with each
    of its decoders.
    Raises:  DataError for a length or decoder that no model has, and for a size that does not fit a model.
    """
    pairs: list[tuple[str, Setting]] = []
    lengths: dict[str, str] = {}
    decoders: set[str] = set()
    for name, tokenizer in models.items():
        try:
            whole, *others = tokenizer.lengths(size, size)
        except ValueError as error:
            raise DataError(f"--res {size}: {name}: {error}.") from None
        fixed = " or ".join(f"{length:,}" for length in sorted((whole, *others)))
        lengths[name] = f"{name} has 1 to {whole:,}" if tokenizer.flexible else f"{name} always has {fixed}"
        decoders |= {*tokenizer.decoder_names}
        for setting in itertools.chain.from_iterable(_each_decoder(tokenizer, each) for each in settings):
            length = setting.tokens or whole
            if length in (whole, *others) or (tokenizer.flexible and length < whole):
                pairs.append((name, setting))
    for missing in (setting.decoder for setting in settings if setting.decoder not in (None, *decoders)):
        raise DataError(f"--decoder {missing}: no model has it; they have {' and '.join(sorted(decoders))}.")
    measured = {setting.tokens for _, setting in pairs}
    swept = dict.fromkeys(setting.tokens for setting in settings if setting.tokens)
    impossible = [str(tokens) for tokens in swept if tokens not in measured]
    if impossible:
        raise DataError(
            f"--sweep tokens: no model has {' or '.join(impossible)} tokens at {size} px "
            f"({'; '.join(lengths.values())}). Use one --model for each length, or a model of flexible length."
        )
    return pairs


def _each_decoder(tokenizer: V2FlowTokenizer, setting: Setting) -> list[Setting]:
    """``setting`` with its decoder, if the model has it; with each of the model's if it names none."""
    names = tokenizer.decoder_names
    if setting.decoder is not None or len(names) == 1:
        return [setting] if setting.decoder in (None, *names) else []
    labels = [f"{setting.label}, decoder {name}".removeprefix(", ") for name in names]
    return [dataclasses.replace(setting, label=label, decoder=name) for label, name in zip(labels, names)]
