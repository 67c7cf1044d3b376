"""Sweeps: keys, products, and lengths that a model has or has not."""

from pathlib import Path

import pytest
import torch

from tests.tokenizer.test_seams import build
from v2flow_cli.bench.candidates import Batch
from v2flow_cli.bench.coder import v2flow_coder
from v2flow_cli.bench.sweep import Setting, parse_sweeps, settings_of_models
from v2flow_cli.errors import DataError
from v2flow_cli.tokenizer import V2FlowTokenizer


def test_every_combination_the_first_key_slowest() -> None:
    found = parse_sweeps(["cfg=1,2.5", "solver=euler,dpm++"], {"num_flow_steps": 4, "num_mask_steps": None})
    assert [setting.label for setting in found] == [
        "cfg 1, solver euler",
        "cfg 1, solver dpm++",
        "cfg 2.5, solver euler",
        "cfg 2.5, solver dpm++",
    ]
    assert found[3].values == {"num_flow_steps": 4, "guidance_scale": 2.5, "solver": "dpm++"}
    assert [s.tokens for s in parse_sweeps(["tokens=64,128"])] == [64, 128]
    assert parse_sweeps([]) == [Setting()]
    assert parse_sweeps(["temperature=0.5"])[0].values == {"noise_temperature": 0.5}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["size=1,2"], "KEY one of tokens, decoder, refine, cfg"),
        (["cfg"], "expected KEY=V1,V2"),
        (["cfg=1,high"], "expected numbers from 0 on"),
        (["rounds=0"], "expected whole numbers from 1 on"),
        (["rounds=1.5"], "expected whole numbers"),
        (["solver=euler,magic"], r"expected euler, heun, dpm\+\+, ddim"),
        (["schedule=up"], "expected constant, linear"),
        (["cfg=1,1.0"], "expected different values"),
        (["cfg=1,2", "cfg=3"], "cfg is set twice"),
        (["noise=1", "temperature=1"], "temperature is set twice"),
        (["cfg="], "expected numbers"),
    ],
)
def test_bad_sweeps(texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_sweeps(texts)
    with pytest.raises(ValueError, match="set twice"):
        parse_sweeps(["steps=1,2"], {"num_flow_steps": 4})


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_folder: Path) -> V2FlowTokenizer:
    return V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder)


def test_a_fixed_length_tokenizer_is_measured_at_its_length(tokenizer: V2FlowTokenizer) -> None:
    settings = parse_sweeps(["tokens=4,16"])
    with pytest.raises(
        DataError, match=r"no model has 16 tokens at 32 px \(small always has 4\).*one --model for each"
    ):
        settings_of_models({"small": tokenizer}, 32, settings)
    assert settings_of_models({"small": tokenizer}, 32, settings[:1]) == [("small", settings[0])]
    assert settings_of_models({"small": tokenizer}, 64, settings[1:]) == [("small", settings[1])]
    with pytest.raises(DataError, match=r"--res 33: small: .*multiples of"):
        settings_of_models({"small": tokenizer}, 33, [Setting()])


def test_refined_ids_are_found_for_their_own_length() -> None:
    flexible = build()
    photos = torch.rand(2, 3, 32, 32) * 2 - 1
    settings = parse_sweeps(["tokens=2,6", "refine=0,3"], {"cfg": None})
    coders = [v2flow_coder("m", flexible, setting) for setting in settings]
    assert len({coder.source for coder in coders}) == 3  # without steps the shorter ids are a prefix
    batch = Batch(photos, torch.zeros(2, 32, 32, 3, dtype=torch.uint8), (0, 1))
    for setting, coder in zip(settings, coders):
        expected = flexible.encode(photos, setting.tokens, setting.refine_steps)
        assert torch.equal(batch.token_ids(coder), expected)
        assert coder.settings.get("refine_steps", 0) == setting.refine_steps


def test_the_model_refines_where_a_setting_has_tokens() -> None:
    flexible = build()
    flexible.config.refine_steps = 3
    for text, expected in (("tokens=2", 3), ("refine=0", 0), ("refine=5", 5), ("cfg=1", 0)):
        (setting,) = parse_sweeps([text])
        coder = v2flow_coder("m", flexible, setting)
        assert (coder.refine_steps, coder.settings.get("refine_steps", 0)) == (expected, expected)
        assert (coder.name == "m, tokens 2, refine 3") == (text == "tokens=2")  # no row hides it
    (setting,) = parse_sweeps(["tokens=2"], {"refine": 0})
    assert v2flow_coder("m", flexible, setting).refine_steps == 0


def test_a_flexible_tokenizer_is_measured_at_every_prefix(
    tokenizer: V2FlowTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(V2FlowTokenizer, "flexible", True)
    settings = parse_sweeps(["tokens=1,4"])
    assert settings_of_models({"flex": tokenizer}, 32, settings) == [("flex", settings[0]), ("flex", settings[1])]
    with pytest.raises(DataError, match=r"no model has 5 tokens at 32 px \(flex has 1 to 4\)"):
        settings_of_models({"flex": tokenizer}, 32, parse_sweeps(["tokens=1,5"]))
