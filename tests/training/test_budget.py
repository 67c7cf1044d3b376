"""A set of models in a given time: how it is shared out, what a stage makes of it, and a rehearsal of everything."""

import dataclasses
import io
import json
import math
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image

from tests.conftest import RECIPES
from tests.store.test_shards import write_tar
from v2flow_cli.errors import DataError, ModelError, RecipeError, V2FlowError
from v2flow_cli.recipe import dump_recipe, load_recipe
from v2flow_cli.recipe.budget import ancestors, is_continued, load_budget
from v2flow_cli.recipe.schema import Recipe
from v2flow_cli.training import budget_stage
from v2flow_cli.training.budget import check_inputs, figures, run_budget, stages_to_do
from v2flow_cli.training.budget_stage import StageResult, StageRun, saved_position, train_stage
from v2flow_cli.training.checkpoint import save_checkpoint
from v2flow_cli.training.flops import training_flop
from v2flow_cli.training.objectives.language_model import pretrain
from v2flow_cli.training.schedule import planned_windows, window

TINY = RECIPES / "tiny"


def write(tmp_path, stages):
    path = tmp_path / "budget.yaml"
    tree = {"kind": "budget", "folder": str(tmp_path / "runs"), "stages": stages}
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def training(tmp_path, name, share, after=(), *settings):
    """A stage of one of the tiny recipes that writes to a folder of its own."""
    settings = [f"output={tmp_path / 'runs' / name}", *settings]
    return {"recipe": str(TINY / f"{name}.yaml"), "set": settings, "share": share, "after": list(after)}


# -- the time --------------------------------------------------------------------------------------------------


@pytest.fixture
def diamond(tmp_path):
    stages = {
        "autoencoder": training(tmp_path, "autoencoder", 10),
        "lm": training(tmp_path, "lm", 5),
        "tokenizer": training(tmp_path, "tokenizer", 50, ["autoencoder", "lm"]),
        "tokens": {"run": "v2flow encode x --max-minutes {minutes}", "share": 10, "after": ["tokenizer"]},
        "llm": training(tmp_path, "llm", 30, ["tokens"]),
    }
    return load_budget(write(tmp_path, stages))


def test_shares_are_relative_to_the_longest_path(diamond):
    seconds = planned_windows(diamond.stages, list(diamond.stages), 1000.0)
    assert seconds == {"autoencoder": 100, "lm": 50, "tokenizer": 500, "tokens": 100, "llm": 300}


def test_a_stage_gets_its_share_of_what_is_left(diamond):
    left = ["tokenizer", "tokens", "llm"]
    assert window(diamond.stages, left, "tokenizer", 450.0) == 250.0  # half of it: all later stages get less
    assert window(diamond.stages, ["llm"], "llm", 7.0) == 7.0


def test_a_stage_waits_for_all_its_ancestors(diamond):
    """If ``lm`` has to run again although ``tokenizer`` is done, nothing that needs either of them starts before it."""
    assert ancestors(diamond.stages, "llm") == {"autoencoder", "lm", "tokenizer", "tokens"}
    assert ancestors(diamond.stages, "lm") == set()
    assert planned_windows(diamond.stages, ["lm", "tokens", "llm"], 450.0) == {"lm": 50, "tokens": 100, "llm": 300}


def test_a_stage_that_a_later_one_starts_from_is_not_continued(diamond):
    assert {name: is_continued(diamond.stages, name) for name in diamond.stages} == {
        "autoencoder": False,
        "lm": False,
        "tokenizer": False,
        "tokens": False,
        "llm": True,
    }


def test_only_some_stages_and_those_that_they_need(tmp_path):
    stages = {
        "autoencoder": training(tmp_path, "autoencoder", 10),
        "lm": training(tmp_path, "lm", 5),
        "tokenizer": training(tmp_path, "tokenizer", 50, ["autoencoder"]),
        "llm": training(tmp_path, "llm", 30, ["tokenizer", "lm"]),
    }
    path = write(tmp_path, stages)
    found = load_budget(path, only=["tokenizer"])
    assert list(found.stages) == ["autoencoder", "tokenizer"]
    assert not is_continued(found.stages, "tokenizer")  # the LLM starts from it
    stages["autoencoder"]["again"] = True
    again = load_budget(write(tmp_path, stages), only=["tokenizer"])  # only what is named is trained further
    assert not is_continued(again.stages, "autoencoder")
    assert is_continued(load_budget(path, only=["autoencoder"]).stages, "autoencoder")
    with pytest.raises(RecipeError, match=r"--set llm\.train\.seed=1: --only leaves this stage out"):
        load_budget(path, ["llm.train.seed=1"], only=["tokenizer"])
    assert list(load_budget(path, only=["llm"]).stages) == list(stages)
    assert is_continued(load_budget(path, only=["llm", "lm"]).stages, "llm")
    with pytest.raises(RecipeError, match=r"tokeniser is not a stage; did you mean tokenizer\?"):
        load_budget(path, only=["tokeniser"])
    with pytest.raises(RecipeError, match="x is not a stage; its stages: autoencoder, lm, tokenizer, llm"):
        load_budget(path, only=["x"])


# -- one stage -------------------------------------------------------------------------------------------------


class Engine:
    """A training that takes ``second`` a step, and records its calls."""

    def __init__(self, second: float = 0.01, fits: float = math.inf) -> None:
        self.second, self.fits, self.steps, self.calls = second, fits, 0, []

    def __call__(self, recipe: Recipe, log, probe) -> StageResult:
        loop = recipe.train
        self.calls.append(loop)
        assert loop.budgeted
        if loop.batch_size // loop.accumulate > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        limit = loop.max_minutes * 60 or math.inf
        if probe is not None:
            assert loop.steps == budget_stage.ENDLESS
            self.steps += max(1, int(probe[0] / self.second))
        while probe is None and self.steps < loop.steps and self.steps * self.second < limit:
            self.steps += 1
        return StageResult(self.steps, self.steps * self.second, {"loss": 1.0}, self.second)


def stage(seconds=100.0):
    return StageRun(str(TINY / "autoencoder.yaml"), [], seconds, seconds)


def run(state, engine):
    lines = []
    train_stage(state, lambda: None, lines.append, engine)
    return lines


def test_the_first_steps_set_the_schedule():
    state, engine = stage(), Engine()
    run(state, engine)
    first, second = engine.calls
    assert first.steps == budget_stage.ENDLESS and first.max_minutes == 0
    assert second.steps == state.steps == engine.steps == state.steps_done
    assert 9_000 < state.steps <= 10_001  # its clock is not the test's: 5 s of 0.01 s a step, then 95% of 100 s
    assert state.done and state.images == 4 * state.steps and state.seconds_per_step == pytest.approx(0.01)


@pytest.mark.parametrize(("cache", "steps"), [("latents", 2_840), ("memory", 1_420)])
def test_latents_cached_on_disk_are_computed_only_at_the_first_start(cache, steps, monkeypatch):
    clock, filled = [0.0], []

    def engine(recipe, log, probe):
        if recipe.latents.cache == "memory" or not filled:
            clock[0] += 300
            filled.append(True)
        done = 5 if probe is not None else recipe.train.steps
        clock[0] += 0.2 * done
        return StageResult(done, 0.2 * done, {"loss": 1.0}, 0.2)

    monkeypatch.setattr(budget_stage.time, "monotonic", lambda: clock[0])
    state = StageRun(str(TINY / "tokenizer.yaml"), [f"latents.cache={cache}"], 900.0, 900.0)
    run(state, engine)
    assert state.steps == pytest.approx(steps, rel=0.01)  # 95% of 900 s less 300 s once or twice and the first steps
    assert clock[0] < 900


def test_a_stage_that_was_killed_keeps_its_number_of_steps():
    state, engine = stage(), Engine()
    state.steps, engine.steps = 5_000, 700
    run(state, engine)
    [call] = engine.calls
    assert (call.steps, engine.steps) == (5_000, 5_000)


def stopped(tmp_path, seconds, steps=5_000):
    """A stage of ``steps`` steps that was stopped at step 700, after 7 s, and its training."""
    state, engine = stage(seconds), Engine()
    state.overrides = [f"output={tmp_path}"]
    state.steps, state.seconds_per_step, engine.steps = steps, 0.01, 700
    save_checkpoint(tmp_path / "checkpoints", 700, {}, {"train_state": {"step": 700, "seconds": 7.0}}, keep=1)
    return state, engine


@pytest.mark.parametrize(("seconds", "steps"), [(43.5, 5_000), (1e4, 5_000), (42.0, 700 + 3_990), (10.0, 700 + 950)])
def test_a_stopped_stage_that_has_less_time_takes_the_steps_that_fit(tmp_path, seconds, steps):
    state, engine = stopped(tmp_path, seconds)
    lines = run(state, engine)
    [call] = engine.calls
    assert call.steps == state.steps == engine.steps == steps and state.done
    assert call.max_minutes * 60 == pytest.approx(7.0 + seconds, abs=5.0)  # the time before counts
    expected = (
        f"of the 4,300 steps left fit into {seconds / 60:.1f} minutes at 0.01 s a step: its schedule ends at step"
    )
    assert [expected in line for line in lines] == ([] if steps == 5_000 else [True])


def test_a_stopped_stage_without_time_for_a_step_keeps_its_number_of_steps(tmp_path):
    state, engine = stopped(tmp_path, seconds=0.005)
    with pytest.raises(V2FlowError, match=r"one step takes 0\.0 s, but its share"):
        run(state, engine)
    assert state.steps == 5_000 and not engine.calls
    state.seconds = state.planned_seconds = 100.0
    run(state, engine)
    assert engine.steps == 5_000


def test_a_shortened_language_model_reaches_the_end_of_its_schedule(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(f"picture number {i} shows noise of some kind" for i in range(200)))
    settings = [f"output={tmp_path / 'lm'}", f"text=[{tmp_path / 'text.txt'}]"]
    recipe = load_recipe(TINY / "lm.yaml", settings)
    loop = dataclasses.replace(recipe.train, budgeted=True, log_every=1, steps=100, max_minutes=1e-6)
    pretrain(dataclasses.replace(recipe, train=loop), log=lambda line: None)  # the time limit stops it
    (tmp_path / "lm" / "config.json").unlink()
    assert saved_position(recipe)[0] == 1
    state = StageRun(str(TINY / "lm.yaml"), [*settings, "train.log_every=1"], 300.0, 300.0, 100, seconds_per_step=80.0)
    train_stage(state, lambda: None, lambda line: None)
    assert state.done and state.steps == state.steps_done == 4
    history = json.loads((tmp_path / "lm/checkpoints/checkpoint-4/trainer_state.json").read_text())["log_history"]
    rates = {line["step"]: line["learning_rate"] for line in history if "loss" in line}
    assert rates[4] == pytest.approx(rates[3] / 2)  # the cosine of 4 steps after 2 of warm-up, not of 100


def test_more_minutes_continue_the_first_run():
    state, engine = stage(), Engine()
    run(state, engine)
    before = state.steps_done
    state.seconds = 50.0
    run(state, engine)
    assert before + 4_000 < state.steps_done == state.steps < before + 6_000


def test_too_little_time_for_a_step_is_an_error():
    state, engine = stage(seconds=2.0), Engine(second=3.0)
    with pytest.raises(V2FlowError, match=r"one step takes 3.0 s, but its share of the budget is 2.0 s. Use more"):
        run(state, engine)
    assert not state.done
    state.seconds = state.planned_seconds = 100.0
    run(state, engine)  # it continues from that step
    assert state.done and engine.steps > 1


def test_too_little_memory_halves_the_batch_and_keeps_the_recipes():
    state, engine = stage(), Engine(fits=1)
    lines = run(state, engine)
    assert [call.accumulate for call in engine.calls] == [1, 2, 4, 4] and state.accumulate == 4
    assert {call.batch_size for call in engine.calls} == {4}
    assert "now 2 micro-batches of 2 per step, with the recipe's batch of 4" in lines[0]
    with pytest.raises(V2FlowError, match=r"too little memory even for micro-batches of 1 \(CUDA out of memory"):
        run(stage(), Engine(fits=0))


def test_other_errors_are_not_treated_as_out_of_memory():
    def broken(recipe, log, probe):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        run(stage(), broken)


@pytest.mark.parametrize("name", ["autoencoder", "tokenizer", "lm"])
def test_operations_are_counted_from_shapes(name, tmp_path, world):
    more = [f"vocabulary.llm={world / 'lm'}", f"latents.autoencoder={world / 'ae'}"] if name == "tokenizer" else []
    assert training_flop(load_recipe(TINY / f"{name}.yaml", more)) > 1e5


# -- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 0}, "share is 0; expected a number above 0"),
        ({"after": ["lmm"]}, "names lmm, which is no stage; did you mean lm?"),
        ({"after": ["tokenizer"]}, "wait for each other"),
        ({"recipe": "nowhere.yaml"}, "nowhere.yaml: no such recipe"),
        ({"shares": 3}, "shares is not a known key; did you mean share?"),
        ({"run": "v2flow"}, "either `recipe`, the path of one, or `run`"),
        ({"set": ["train.stepps=3"]}, "train.stepps is not a known key"),
    ],
)
def test_a_bad_budget_is_refused(tmp_path, change, message):
    stages = {"lm": training(tmp_path, "lm", 1), "tokenizer": training(tmp_path, "tokenizer", 1, ["lm"])}
    stages["lm"] |= change
    with pytest.raises(RecipeError, match=message.replace("?", r"\?")):
        load_budget(write(tmp_path, stages))


def test_data_that_no_stage_writes_is_an_error_at_the_start(tmp_path):
    stages = {"autoencoder": training(tmp_path, "autoencoder", 1, (), f"data.sources=[{tmp_path / 'photos'}]")}
    budget = load_budget(write(tmp_path, stages))
    with pytest.raises(DataError, match=r"photos does not exist, .* --set autoencoder.data.sources=\[PATH\]"):
        check_inputs(budget, stages_to_do(budget))
    stages["make"] = {"run": f"python make.py --out {tmp_path / 'photos'}", "share": 1}
    budget = load_budget(write(tmp_path, stages))
    check_inputs(budget, stages_to_do(budget))


def test_an_output_of_another_recipe_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    sources = f"data.sources=[{tmp_path / 'photos'}]"
    budget = load_budget(write(tmp_path, {"autoencoder": training(tmp_path, "autoencoder", 1, (), sources)}))
    recipe = budget.stages["autoencoder"].recipe
    output = tmp_path / "runs" / "autoencoder"
    output.mkdir(parents=True)
    (output / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="already holds a run, which is not one of this budget"):
        check_inputs(budget, ["autoencoder"])
    StageRun("", [], 1.0).save(budget.folder / "budget-autoencoder.json")
    other = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, encoder_width=32))
    for saved, fine in ((recipe, True), (other, False)):
        (output / "recipe.yaml").write_text(dump_recipe(saved))
        if fine:
            check_inputs(budget, ["autoencoder"])
        else:
            with pytest.raises(ModelError, match=r"model\.encoder_width: 32 before, 16 now"):
                check_inputs(budget, ["autoencoder"])


def test_a_stage_that_runs_again_comes_before_what_needs_it_by_way_of_a_finished_one(tmp_path):
    made, slow = tmp_path / "made", "import pathlib, sys, time; time.sleep(0.5); pathlib.Path(sys.argv[1]).touch()"
    reads = "import pathlib, sys; sys.exit(not pathlib.Path(sys.argv[1]).exists())"
    stages = {
        "data": {"run": [sys.executable, "-c", slow, str(made)], "share": 1},
        "first": {"run": [sys.executable, "-c", ""], "share": 1, "after": ["data"]},
        "second": {"run": [sys.executable, "-c", reads, str(made)], "share": 1, "after": ["first"]},
    }
    budget = load_budget(write(tmp_path, stages))
    budget.folder.mkdir()
    (budget.folder / "budget.json").write_text(json.dumps({"first": 1.0}))
    lines: list[str] = []
    run_budget(budget, 0.1, lines.append)
    assert [line.split(":")[0] for line in lines if ": starts, with" in line] == ["data", "second"]


# -- everything ------------------------------------------------------------------------------------------------


def command(path, minutes, *more):
    line = [sys.executable, "-m", "v2flow_cli", "budget", str(path), "--minutes", str(minutes), "--json", *more]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)["stages"]
    return {row["stage"]: row for row in rows}, done.stderr


def test_a_rehearsal_from_autoencoder_to_llm_and_a_second_run(tmp_path):
    photos, tars, runs = tmp_path / "photos", tmp_path / "tars", tmp_path / "runs"
    photos.mkdir()
    tars.mkdir()
    members = []
    for i in range(8):
        buffer = io.BytesIO()
        image = Image.effect_noise((80, 72), 20 + 9 * i).convert("RGB")
        image.save(photos / f"{i}.png")
        image.save(buffer, "PNG")
        members += [(f"{i}.png", buffer.getvalue()), (f"{i}.txt", b"noise, and more of it\n")]
    write_tar(tars / "a.tar", members)
    (tmp_path / "text.txt").write_text("\n".join(f"picture number {i} shows noise of some kind" for i in range(300)))
    sources = f"data.sources=[{photos}]"
    encode = f"v2flow encode {tars} -o {runs / 'tokens'} --model {runs / 'tokenizer'} --max-minutes {{minutes}}"
    stages = {
        "autoencoder": training(tmp_path, "autoencoder", 1, (), sources),
        "lm": training(tmp_path, "lm", 1, (), f"text=[{tmp_path / 'text.txt'}]"),
        "tokenizer": training(
            tmp_path,
            "tokenizer",
            1.5,
            ["autoencoder", "lm"],
            sources,
            f"latents.autoencoder={runs / 'autoencoder'}",
            f"vocabulary.llm={runs / 'lm'}",
            "quantizer.usage_floor=0",
        ),
        "tokens": {"run": encode, "share": 1, "after": ["tokenizer"]},
        "llm": training(
            tmp_path,
            "llm",
            1.5,
            ["tokens"],
            f"llm={runs / 'lm'}",
            f"tokenizer={runs / 'tokenizer'}",
            f"data.token_sets=[{runs / 'tokens'}]",
        ),
    }
    path = write(tmp_path, stages)
    first, text = command(path, 0.5)
    begun = [line.split(":")[0] for line in text.splitlines() if ": starts, with" in line]
    assert begun == ["autoencoder", "lm", "tokenizer", "tokens", "llm"]
    assert text.index("lm: starts, with") < text.index("autoencoder: step")  # side by side
    assert all(first[name]["steps"] >= 1 and first[name]["images_per_s"] > 0 for name in stages if name != "tokens")
    assert {folder.name for folder in runs.iterdir() if folder.is_dir()} >= {"autoencoder", "lm", "tokenizer", "llm"}
    assert (runs / "llm" / "model.safetensors").is_file() and first["llm"]["figure"].startswith("loss")
    second, text = command(path, 0.1)
    assert "tokenizer: done by an earlier run" in text and "continues from step" in text
    assert second["llm"]["steps"] > first["llm"]["steps"]
    assert all(second[name]["steps"] == first[name]["steps"] for name in ("autoencoder", "lm", "tokenizer"))
    assert [row.stage for row in figures(load_budget(path))] == list(stages)
