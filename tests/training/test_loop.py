"""The loop on tiny recipes: it learns, resumes exactly, and stops where it must."""

import itertools
import json
import os
import signal
import stat
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from v2flow_cli.errors import DataError, ModelError, RecipeError, V2FlowError
from v2flow_cli.recipe import dump_recipe, load_recipe
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.training.checkpoint import Interrupted
from v2flow_cli.training.crops import CropBatches
from v2flow_cli.training.loop import build_objective, train
from v2flow_cli.training.optimizer import learning_rate_at

from .conftest import TRANSFORMER, quiet, recipe


@pytest.mark.parametrize(
    ("name", "more"), [("autoencoder", ()), ("tokenizer", ()), ("tokenizer", ("data.aspects=[0.5,1.0,2.0]",))]
)
def test_resuming_equals_not_stopping(world, tmp_path, name, more):
    whole = train(recipe(world, name, tmp_path / "whole", "train.steps=4", *more), resume=False, log=quiet)
    first = recipe(world, name, tmp_path / "parts", "train.steps=4", "train.save_every=1", *more)

    stopped_at = []

    def stop_after_two(message):
        if message.startswith("step 2"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as stop:
        train(first, resume=False, log=stop_after_two)
    stopped_at.append(stop.value.step)
    assert stopped_at[0] in (2, 3)
    parts = train(first, resume=True, log=quiet)
    for file in ("model.safetensors",):
        one, two = load_file(whole.folder / file), load_file(parts.folder / file)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[k], two[k]) for k in one)
    assert parts.images == whole.images == 16


@pytest.mark.parametrize("aspects", ["[]", "[0.5,1.0,2.0]"])
def test_workers_do_not_change_the_data(world, tmp_path, monkeypatch, aspects):
    from v2flow_cli.training import crops

    def batches(worker, workers):
        monkeypatch.setattr(crops, "get_worker_info", lambda: SimpleNamespace(id=worker, num_workers=workers))
        return list(itertools.islice(crops.CropBatches(data, 3, seed=7, start=2), 4))

    data = recipe(world, "autoencoder", tmp_path, f"data.aspects={aspects}").data
    alone, first, second = batches(0, 1), batches(0, 2), batches(1, 2)
    for one, two in zip(alone, [first[0], second[0], first[1], second[1]]):
        assert one.keys == two.keys and torch.equal(one.images, two.images)


def test_each_batch_draws_a_shape_that_all_ranks_share(world, tmp_path):
    data = recipe(world, "tokenizer", tmp_path, "data.aspects=[0.5,1.0,2.0]").data
    assert data.crop_size == 64
    where = dict(seed=1, world_size=2, multiple=16)
    ranks = [list(itertools.islice(CropBatches(data, 2, rank=rank, **where), 12)) for rank in (0, 1)]
    shapes = [[tuple(batch.images.shape[2:]) for batch in batches] for batches in ranks]
    assert shapes[0] == shapes[1] and set(shapes[0]) == {(96, 48), (64, 64), (48, 96)}
    with pytest.raises(RecipeError, match=r"data.aspects is \[5.0\]; expected width / height from 0.25 to 4.0"):
        recipe(world, "tokenizer", tmp_path, "data.aspects=[5]")
    with pytest.raises(RecipeError, match=r"draws a shape for each batch, but latents\.cache stores one shape"):
        recipe(world, "tokenizer", tmp_path, "data.aspects=[2]", "latents.cache=memory")
    with pytest.raises(RecipeError, match=r"data\.resident_px stores only squares"):
        recipe(world, "tokenizer", tmp_path, "data.aspects=[2]", "data.resident_px=64")


def test_a_trained_tokenizer_loads_and_its_recipe_lies_beside_it(world, tmp_path):
    done = train(recipe(world, "tokenizer", tmp_path / "t", "train.steps=3"), resume=False, log=quiet)
    model = V2FlowTokenizer.from_pretrained(done.folder)
    assert model.encode(torch.zeros(1, 3, 64, 64)).shape == (1, 16)
    assert load_recipe(done.folder / "recipe.yaml").train.steps == 3
    lines = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert {"train/flow_loss", "train/regression_loss", "train/commit_loss", "images_per_second"} <= lines[-1].keys()
    assert "train/codebook_usage" in lines[-1]
    card = (done.folder / "README.md").read_text()
    assert "3 steps of 4 crops of 64 px (12 crops)" in card and "16 tokens of 64 codes" not in card
    assert "256 tokens of 64 codes for a 256 px image" in card


def test_files_of_a_killed_export_are_removed(world, tmp_path):
    (tmp_path / "a" / ".saving-killed" / "half").mkdir(parents=True)
    train(recipe(world, "autoencoder", tmp_path / "a", "train.steps=1"), resume=False, log=quiet)
    assert not list((tmp_path / "a").glob(".*"))


def test_a_run_is_not_overwritten_and_not_resumed_with_another_recipe(world, tmp_path):
    first = recipe(world, "autoencoder", tmp_path / "a", "train.steps=2")
    train(first, resume=False, log=quiet)
    with pytest.raises(ModelError, match="already holds a run"):
        train(first, resume=False, log=quiet)
    with pytest.raises(ModelError, match="the recipe is not that of this run"):
        train(recipe(world, "autoencoder", tmp_path / "a", "optimizer.learning_rate=0.5"), resume=True, log=quiet)


def test_others_can_read_model_and_checkpoints(world, tmp_path):
    before = os.umask(0o022)
    try:
        done = train(recipe(world, "autoencoder", tmp_path / "a", "train.steps=2"), resume=False, log=quiet)
    finally:
        os.umask(before)
    files = [path for path in done.folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json"}
    assert [path for path in files if not path.stat().st_mode & stat.S_IROTH] == []


def test_two_runs_in_one_folder_are_refused(world, tmp_path):
    chosen = recipe(world, "autoencoder", tmp_path / "a", "train.steps=2")
    seen = []

    def start_another(step):
        with pytest.raises(DataError, match="another run is writing here"):
            train(chosen, resume=True, log=quiet)
        seen.append(step)

    train(chosen, resume=False, log=quiet, at_step=start_another)
    assert seen


def test_a_damaged_checkpoint_is_skipped(world, tmp_path):
    made = recipe(world, "autoencoder", tmp_path / "a", "train.steps=4", "train.save_every=2")
    train(made, resume=False, log=quiet)
    newest = tmp_path / "a" / "checkpoints" / "step-00000004" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-8])
    lines = []
    train(made, resume=True, log=lines.append)
    assert any("step-00000002 at step 2" in line for line in lines)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(world, tmp_path):
    made = recipe(world, "autoencoder", tmp_path / "n")
    broken = replace(made, loss=replace(made.loss, mse=float("nan")))  # which no recipe file may say
    with pytest.raises(V2FlowError, match=r"step 0, rank 0: the loss is not finite .* on samples \w+"):
        train(broken, resume=False, log=quiet)
    assert not (tmp_path / "n" / "model.safetensors").exists()


def test_a_dead_codebook_stops_the_run(world, tmp_path, monkeypatch):
    monkeypatch.setattr("v2flow_cli.training.objectives.tokenizer.FLOOR_GRACE_STEPS", 0)
    made = recipe(world, "tokenizer", tmp_path / "d")
    made = replace(made, quantizer=replace(made.quantizer, usage_floor=1.1))  # which no codebook reaches
    with pytest.raises(V2FlowError, match=r"of the codebook is in use; the recipe's floor"):
        train(made, resume=False, log=quiet)


def test_training_lowers_the_loss(world, tmp_path):
    made = recipe(world, "autoencoder", tmp_path / "l", "train.steps=60", "train.log_every=1", "train.save_every=60")
    train(made, resume=False, log=quiet)
    losses = [json.loads(x)["train/loss"] for x in (tmp_path / "l" / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_learning_rate_warms_up_and_falls_along_a_cosine(world, tmp_path):
    made = recipe(world, "autoencoder", tmp_path, "optimizer.warmup_steps=10", "optimizer.learning_rate=1.0").optimizer
    assert learning_rate_at(0, made, 110) == pytest.approx(0.1)
    assert learning_rate_at(10, made, 110) == pytest.approx(1.0)
    assert learning_rate_at(60, made, 110) == pytest.approx(0.51)
    assert learning_rate_at(110, made, 110) == pytest.approx(0.02)


def test_starting_from_another_tokenizer(world, tmp_path):
    done = train(recipe(world, "tokenizer", tmp_path / "t", "train.steps=3"), resume=False, log=quiet)
    again = build_objective(recipe(world, "tokenizer", tmp_path / "u", f"init_from={done.folder}"))
    saved = load_file(done.folder / "model.safetensors")
    assert all(torch.equal(saved[k], v) for k, v in again.model.state_dict().items())
    # another stage: the settings are this recipe's, not the ones that the weights were trained with
    more = ("quantizer.start_step=1", "flow.share=0.5", "loss.commit=0.5", "sampling.num_flow_steps=3")
    later = recipe(world, "tokenizer", tmp_path / "u", f"init_from={done.folder}", *more)
    config = build_objective(later).model.config
    assert (config.quantizer["start_step"], config.flow["share"], config.sampling["num_flow_steps"]) == (1, 0.5, 3)
    with pytest.raises(ModelError, match=r"only one of them has quantizer\.usage"):
        build_objective(
            recipe(world, "tokenizer", tmp_path / "u", f"init_from={done.folder}", "quantizer.usage_decay=0.9")
        )
    with pytest.raises(ModelError, match=r"quantizer\.codebook_size is 64, but the recipe says 32"):
        build_objective(
            recipe(world, "tokenizer", tmp_path / "u", f"init_from={done.folder}", "quantizer.codebook_size=32")
        )


def test_a_deeper_decoder_starts_as_the_same_function(world, tmp_path):
    done = train(recipe(world, "tokenizer", tmp_path / "t", "train.steps=3"), resume=False, log=quiet)
    given = V2FlowTokenizer.from_pretrained(done.folder)
    depths = given.config.section("context")
    start = (f"init_from={done.folder}", "freeze_tokens=true")
    deeper = (f"context.encoder_depth={depths.encoder_depth + 2}", f"context.decoder_depth={depths.decoder_depth + 1}")
    made = recipe(world, "tokenizer", tmp_path / "u", *start, *deeper, "train.steps=3")
    grown = build_objective(made).model.eval()
    ids = given.encode(torch.rand(2, 3, 64, 64) * 2 - 1)
    for rounds in (1, 3):
        assert torch.allclose(
            grown.decode(ids, num_mask_steps=rounds), given.decode(ids, num_mask_steps=rounds), atol=1e-5
        )
    trained = V2FlowTokenizer.from_pretrained(train(made, resume=False, log=quiet).folder)
    assert trained.token_digest == given.token_digest
    new = {k: v for k, v in trained.state_dict().items() if k not in given.state_dict()}
    for name, value in new.items():  # all of what was added is learned, from the first step on
        assert value.any(), name
    shallow = (f"init_from={tmp_path / 'u'}", f"context.encoder_depth={depths.encoder_depth}")
    with pytest.raises(ModelError, match=r"context\.encoder_depth is \d, but the recipe says \d"):
        build_objective(recipe(world, "tokenizer", tmp_path / "v", *shallow))


def test_deeper_registers_and_flow_transformer_start_as_the_same_function(world, tmp_path):
    done = train(recipe(world, "tokenizer", tmp_path / "t", *TRANSFORMER, "train.steps=3"), resume=False, log=quiet)
    given = V2FlowTokenizer.from_pretrained(done.folder)
    depths = given.config.section("resampler").depth, given.config.section("flow").depth
    deeper = (f"resampler.depth={depths[0] + 2}", f"flow.depth={depths[1] + 1}")
    made = recipe(
        world, "tokenizer", tmp_path / "u", *TRANSFORMER, f"init_from={done.folder}", *deeper, "train.steps=3"
    )
    grown = build_objective(made).model.eval()
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    ids = given.encode(images)
    assert torch.equal(grown.encode(images), ids)
    for noise in (0.0, 1.0):
        settings = dict(num_flow_steps=3, noise_temperature=noise)
        assert torch.allclose(grown.decode(ids, **settings), given.decode(ids, **settings), atol=1e-5)
    trained = V2FlowTokenizer.from_pretrained(train(made, resume=False, log=quiet).folder)
    new = {k: v for k, v in trained.state_dict().items() if k not in given.state_dict()}
    assert {name.split(".")[0] for name in new} == {"resampler", "flow"}
    first = grown.state_dict()
    for name, value in new.items():  # all of what was added is learned
        assert not torch.equal(value, first[name]), name
    with pytest.raises(ModelError, match=r"resampler\.depth is \d, but the recipe says \d"):
        build_objective(recipe(world, "tokenizer", tmp_path / "v", *TRANSFORMER, f"init_from={tmp_path / 'u'}"))


def test_without_a_vocabulary_and_with_ddim(world, tmp_path):
    more = ["vocabulary.llm=none", "flow.formulation=ddim", "sampling.solver=ddim", "train.steps=2"]
    done = train(recipe(world, "tokenizer", tmp_path / "n", *more), resume=False, log=quiet)
    model = V2FlowTokenizer.from_pretrained(done.folder)
    ids = model.encode(torch.zeros(1, 3, 32, 32))
    assert torch.isfinite(model.decode(ids)).all() and model.codebook.shape == (64, 32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["autoencoder", "tokenizer"])
def test_two_processes_train_one_model(world, tmp_path, name):
    import subprocess
    import sys

    made = recipe(world, name, tmp_path / "two", "train.steps=4")
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(made))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, "-m", "v2flow_cli.cli.app", "train", str(file), "--json"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = done.stdout.strip().splitlines()  # the first process alone speaks
    assert json.loads(line)["images"] == 16
    if name == "tokenizer":
        V2FlowTokenizer.from_pretrained(tmp_path / "two").encode(torch.zeros(1, 3, 32, 32))
