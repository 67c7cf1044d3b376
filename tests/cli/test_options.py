"""Commands that decode take every decoder option, each with the type of the schema."""

import typing

import pytest

from v2flow_cli.cli import bench_cost, bench_reconstruction, decode, generate
from v2flow_cli.recipe.schema import SAMPLING_OPTIONS, Sampling

DECODING = [decode.decode, generate.generate, bench_reconstruction.reconstruction, bench_cost.cost]


@pytest.mark.parametrize("command", DECODING)
def test_every_decoder_option_is_there(command):
    options, fields = typing.get_type_hints(command), typing.get_type_hints(Sampling)
    for option, field in SAMPLING_OPTIONS.items():
        choices = typing.get_args(fields[field])
        assert not choices or options[option] == typing.Optional[fields[field]]  # noqa: UP045  a type, not a hint


def test_the_options_are_fields_of_the_sampling_section():
    assert set(SAMPLING_OPTIONS.values()) <= typing.get_type_hints(Sampling).keys()
