"""Sweeps: which settings a model is measured at.  ``cfg=1,2,3`` and ``solver=euler,heun`` make six of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

from v2flow_cli.errors import DataError
from v2flow_cli.recipe.schema import SAMPLING_OPTIONS, Sampling
from v2flow_cli.tokenizer import V2FlowTokenizer

TOKENS, DECODER = "tokens", "decoder"


@dataclass(frozen=True)
class Setting:
    """One way to decode.

    values: keyword arguments of ``decode``; tokens: decode only the first so many; decoder: with which decoder.
    """

    label: str = ""  # "" where nothing is swept
    values: Mapping[str, Any] = field(default_factory=dict)
    tokens: int | None = None
    decoder: str | None = None  # None: with each decoder that a model has

    def name(self, model: str) -> str:
        return f"{model}, {self.label}" if self.label else model


def _read(field: str, text: str) -> Any:
    """A value of a field of ``Sampling``, a decoder's name, or a number of tokens.  Raises: ValueError."""
    if field == DECODER:
        return text
    hint = int if field == TOKENS else get_type_hints(Sampling)[field]
    if choices := get_args(hint):
        if text not in choices:
            raise ValueError(f"expected {', '.join(choices)}")
        return text
    least = 1 if hint is int else 0  # counts start at 1, factors at 0
    try:
        value = hint(text)
    except ValueError:
        value = None
    if value is None or not least <= value < 1_000_000:
        raise ValueError(f"expected {'whole numbers' if hint is int else 'numbers'} from {least} on")
    return value


#: What ``--sweep`` takes, and the argument of ``decode`` that it sets.
KEYS = {TOKENS: TOKENS, DECODER: DECODER, **SAMPLING_OPTIONS, "temperature": SAMPLING_OPTIONS["noise"]}


def parse_sweeps(texts: Sequence[str], fixed: Mapping[str, Any] | None = None) -> list[Setting]:
    """Every combination of the ``KEY=V1,V2`` in ``texts``, the first key slowest; one empty setting without any.

    Args:    fixed, arguments of ``decode`` that all settings share; None values are left to the model.
    Raises:  ValueError for an unknown key or value, and for a key that is given twice.
    """
    base = {key: value for key, value in (fixed or {}).items() if value is not None}
    taken = set(base)
    axes: list[list[tuple[str, str, Any]]] = []
    for text in texts:
        key, equals, values = text.partition("=")
        if key not in KEYS or not equals:
            raise ValueError(f"{text}: expected KEY=V1,V2,... with KEY one of {', '.join(KEYS)}")
        argument = KEYS[key]
        if argument in taken:
            raise ValueError(f"{text}: {key} is given twice")
        taken.add(argument)
        try:
            axis = [(f"{key} {value.strip()}", argument, _read(argument, value.strip())) for value in values.split(",")]
        except ValueError as error:
            raise ValueError(f"{text}: {error}") from None
        if len({value for _, _, value in axis}) < len(axis):
            raise ValueError(f"{text}: expected different values")
        axes.append(axis)
    settings = []
    for chosen in itertools.product(*axes):
        arguments = {**base, **{argument: value for _, argument, value in chosen}}
        tokens, decoder = arguments.pop(TOKENS, None), arguments.pop(DECODER, None)
        settings.append(Setting(", ".join(label for label, _, _ in chosen), arguments, tokens, decoder))
    return settings


def settings_of_models(
    models: Mapping[str, V2FlowTokenizer], size: int, settings: Sequence[Setting]
) -> list[tuple[str, Setting]]:
    """(model, setting) of everything to measure at ``size`` pixels.

    A flexible tokenizer decodes any prefix. Another takes part where a swept length is one of its own, so that several
    of them make the rows of one sweep; so with decoders. A length or a decoder that no model has is an error. Where
    no decoder is asked for, a model takes part with each that it has.
    Raises:  DataError, also for a size that does not fit a model.
    """
    chosen: list[tuple[str, Setting]] = []
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
            wanted = setting.tokens or whole
            if wanted in (whole, *others) or (tokenizer.flexible and wanted < whole):
                chosen.append((name, setting))
    for missing in (setting.decoder for setting in settings if setting.decoder not in (None, *decoders)):
        raise DataError(f"--decoder {missing}: no model has it; they have {' and '.join(sorted(decoders))}.")
    wanted_lengths = dict.fromkeys(setting.tokens for setting in settings if setting.tokens)
    had = {setting.tokens for _, setting in chosen}
    lost = [str(tokens) for tokens in wanted_lengths if tokens not in had]
    if lost:
        raise DataError(
            f"--sweep tokens: no model has {' or '.join(lost)} tokens at {size} px ({'; '.join(lengths.values())}). "
            "Give one --model for each length, or a model of flexible length."
        )
    return chosen


def _each_decoder(tokenizer: V2FlowTokenizer, setting: Setting) -> list[Setting]:
    """``setting`` with its decoder, if the model has it; with each of the model's where it names none."""
    names = tokenizer.decoder_names
    if setting.decoder is not None or len(names) == 1:
        return [setting] if setting.decoder in (None, *names) else []
    labels = [f"{setting.label}, decoder {name}".removeprefix(", ") for name in names]
    return [dataclasses.replace(setting, label=label, decoder=name) for label, name in zip(labels, names)]
