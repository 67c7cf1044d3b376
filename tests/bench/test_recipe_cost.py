"""FLOPs by hand, and the output of the command."""

import json

import pytest
import torch
from typer.testing import CliRunner

from v2flow_cli.bench import recipe_cost
from v2flow_cli.bench.recipe_cost import count_flop, measure_recipe
from v2flow_cli.cli.app import app
from v2flow_cli.errors import DataError
from v2flow_cli.recipe import dump_recipe, load_recipe

from ..conftest import RECIPES

CPU = torch.device("cpu")


def tiny(*more):
    named = ["vocabulary.llm=none", "latents.autoencoder=pixels", "latents.patch_size=16"]
    return load_recipe(RECIPES / "tiny" / "tokenizer.yaml", [*named, *more])


@pytest.fixture(autouse=True)
def small_peak(monkeypatch):
    monkeypatch.setitem(recipe_cost.PEAK_SIDE, "cpu", 64)


def flop_of(found, part):
    return next(p.gflop_per_image for p in found.parts if p.part == part) * 1e9


def test_a_product_is_two_operations_a_multiply_add():
    a, b = torch.empty(3, 5, device="meta"), torch.empty(5, 7, device="meta")
    assert count_flop(lambda: a @ b) == 2 * 3 * 5 * 7


def test_another_flow_step_costs_the_head_on_each_position_once_a_branch():
    recipe, found = tiny(), {}
    for steps, scale in ((1, 1.0), (2, 1.0), (1, 2.0), (2, 2.0)):
        settings = {"num_mask_steps": 2, "solver": "euler", "num_flow_steps": steps, "guidance_scale": scale}
        found[steps, scale] = flop_of(measure_recipe(recipe, batch_sizes=[1], device=CPU, **settings), "decode")
    width, depth, patch, positions, rounds = 32, 2, 3 * 16 * 16, 16, 2
    head = 2 * positions * (patch * width + 2 * depth * width**2 + width * patch)
    time = 2 * rounds * (128 * width + width * width + width * (3 * depth + 2) * width)
    assert found[2, 1.0] - found[1, 1.0] == head + time
    assert found[2, 2.0] - found[1, 2.0] == 2 * (head + time)


def test_parts_batches_and_notes():
    found = measure_recipe(tiny(), batch_sizes=[3, 1], autoencoder=True, device=CPU, num_flow_steps=1, solver=None)
    assert [(p.part, p.batch_size) for p in found.parts] == [
        ("encode", 1),
        ("encode", 3),
        ("decode", 1),
        ("decode", 3),
        ("autoencoder encode", 3),
        ("autoencoder decode", 3),
    ]
    for part in found.parts[:4]:
        assert part.images_per_s == pytest.approx(part.batch_size / part.seconds)
        rate = part.gflop_per_image * part.images_per_s
        assert part.peak_share == pytest.approx(rate / found.matmul_peak_gflop_per_s)
        assert part.peak_memory_bytes > 1e6
    assert (found.tokens, found.patches, found.image_size) == (16, 16, 64)
    assert found.settings == {"num_flow_steps": 1, "solver": "euler"}


def test_weights_in_bf16():
    found = measure_recipe(tiny(), batch_sizes=[1], device=CPU, dtype=torch.bfloat16, num_flow_steps=1, solver=None)
    assert [part.part for part in found.parts] == ["encode", "decode"]


def test_recipes_that_cannot_be_measured_are_errors():
    with pytest.raises(DataError, match="names models whose shapes are unknown"):
        measure_recipe(load_recipe(RECIPES / "tiny" / "tokenizer.yaml"), device=CPU)
    with pytest.raises(DataError, match="--res 60: an image of 60 x 60 pixels does not fit"):
        measure_recipe(tiny(), size=60, device=CPU)


def test_the_command(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(tiny()))
    options = ["--speed", str(file), "--batches", "1,2", "--steps", "1", "--dtype", "fp32", "--device", "cpu"]
    done = CliRunner().invoke(app, ["bench", *options, "--json"])
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["settings"]["num_flow_steps"] == 1 and len(report["parts"]) == 4
    assert "timed on latents of its shape" in done.stderr
    table = CliRunner().invoke(app, ["bench", *options]).stdout
    assert "of matmul peak" in table and "GFLOP/image" in table
    assert CliRunner().invoke(app, ["bench", str(file), "--batches", "1,1"]).exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("steps,limit", [(20, 2900e9), (8, 2300e9)])
def test_memory_of_the_large_recipe(steps, limit, monkeypatch):
    class Counted(Exception):
        pass

    def stop(module, device, dtype):
        raise Counted

    counts = []
    monkeypatch.setattr(recipe_cost, "count_flop", lambda step: counts.append(count_flop(step)))
    monkeypatch.setattr(recipe_cost, "randomise", stop)
    with pytest.raises(Counted):
        measure_recipe(load_recipe(RECIPES / "paper" / "512px-256.yaml"), device=CPU, num_flow_steps=steps)
    assert 0.5 * limit < counts[1] < limit
