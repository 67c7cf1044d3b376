import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.reliability.processes import ranks, wait
from tests.reliability.test_07_full_disk import POINTS, disk
from v2flow_cli.errors import ModelError, SharedError, TokenFileError
from v2flow_cli.llm.pairs import Samples
from v2flow_cli.llm.sequences import collate
from v2flow_cli.llm.vocabulary import VisualVocabulary, extend_tables
from v2flow_cli.recipe.load import dump_recipe
from v2flow_cli.recipe.schema import Lora
from v2flow_cli.runtime.digest import weights_digest
from v2flow_cli.store.token_parquet import write_parquet
from v2flow_cli.training.checkpoint import list_checkpoints
from v2flow_cli.training.llm_folder import save_folder
from v2flow_cli.training.llm_setup import choose_trained
from v2flow_cli.training.llm_trainer import training_arguments
from v2flow_cli.training.muon import ADAMW_RMS
from v2flow_cli.training.objectives import drawing as finetuning
from v2flow_cli.training.objectives.drawing import DrawingTrainer, finetune, plan

LORA = Lora(rank=2, alpha=4.0, dropout=0.0)


def logits_of(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model(torch.tensor([[0, 20, 9, 364, 301, 340]])).logits


@pytest.mark.parametrize("family", ["llama", "qwen", "phi", "mixtral"])
def test_the_saved_folder_records_its_visual_tokens(recipe, llm_folder, family):
    log = []
    recipe = replace(recipe, llm=str(llm_folder(family)), data=replace(recipe.data, held_out_share=0.2))
    report = finetune(recipe, log=log.append)
    assert report.steps == 6 and math.isfinite(report.eval_loss)
    assert any("visual_loss" in line and "text_loss" in line for line in log)
    model, tokenizer = (c.from_pretrained(recipe.output) for c in (AutoModelForCausalLM, AutoTokenizer))
    vocabulary = VisualVocabulary.of(model.config, "")
    offset = 320 if family == "qwen" else 300
    assert vocabulary.visual_token_offset == offset and vocabulary.end_image_id == offset + 65
    assert vocabulary.tokens_per_image == 4 and vocabulary.prompt_prefix == (0,)
    assert tokenizer.decode([vocabulary.begin_image_id]) == "<|v2flow:boi|>"
    assert model.get_input_embeddings().weight.shape[0] == offset + 66 and model.config.use_cache
    files = [path for path in Path(recipe.output).rglob("*") if path.is_file()]
    assert {path.stat().st_mode for path in files} == {Path(recipe.output, "README.md").stat().st_mode}
    card = Path(recipe.output, "README.md").read_text()
    assert f"{report.eval_loss:.3f} nats" in card and "1 process(es) on " in card
    counts = np.load(Path(recipe.output, "token_counts.npy"), allow_pickle=False)
    assert counts.shape == (64,) and counts.sum() == 12 * 4


def test_parquet_trains_as_the_token_files_do_and_is_refused_for_another_tokenizer(recipe, tmp_path, token_set):
    straight = finetune(recipe, log=print)
    (table,) = write_parquet(tmp_path / "tokens")
    with_table = replace(recipe, data=replace(recipe.data, token_sets=(str(table),)), output=str(tmp_path / "table"))
    assert finetune(with_table, log=print).train_loss == straight.train_loss
    assert torch.equal(logits_of(recipe.output), logits_of(with_table.output))
    counts = [np.load(Path(output, "token_counts.npy")) for output in (recipe.output, with_table.output)]
    assert np.array_equal(*counts)
    token_set(tmp_path / "others", digest="0" * 16)
    (table,) = write_parquet(tmp_path / "others")
    other = replace(recipe, data=replace(recipe.data, token_sets=(str(table),)), output=str(tmp_path / "other"))
    with pytest.raises(TokenFileError, match="encoded by tokenizer 0000000000000000, but this tokenizer is"):
        finetune(other, log=print)


@pytest.mark.parametrize("kind, mode", [("adamw", "full"), ("adamw", "lora"), ("adamw", "rows"), ("muon", "full")])
def test_resume_equals_not_stopping(recipe, tmp_path, kind, mode):
    optimizer = replace(recipe.optimizer, kind=kind)
    recipe = replace(recipe, mode=mode, lora=LORA if mode == "lora" else None, optimizer=optimizer)
    straight = finetune(recipe, log=print)
    stopped = replace(recipe, output=str(tmp_path / "stopped"))
    # The first run stops at the step from which the second continues, under one schedule of six steps.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning, "RunClock", lambda *given: StopAt(3, *given))
        finetune(stopped, log=print)
    with pytest.raises(ModelError, match=r"already holds a run.*--resume"):
        finetune(stopped, log=print)
    resumed = finetune(stopped, log=print, resume=True)
    assert resumed.steps == straight.steps == 6
    assert resumed.train_loss == pytest.approx(straight.train_loss, abs=1e-6)
    assert torch.equal(logits_of(recipe.output), logits_of(stopped.output))


@pytest.mark.parametrize("family", ["phi", "mixtral"])
def test_muon_moves_every_direction_of_matrices_and_of_experts(recipe, llm_folder, family):
    optimizer = replace(recipe.optimizer, kind="muon", weight_decay=0.0, warmup_steps=0)
    recipe = replace(recipe, llm=str(llm_folder(family)), optimizer=optimizer, train=replace(recipe.train, steps=1))
    finetune(recipe, log=print)
    models = (AutoModelForCausalLM.from_pretrained(folder) for folder in (recipe.llm, recipe.output))
    before, after = (model.model.layers.state_dict() for model in models)
    moved = {name: after[name].float() - before[name].float() for name in before if before[name].ndim >= 2}
    assert family != "mixtral" or any(change.ndim == 3 for change in moved.values())
    for change in moved.values():
        # Every matrix, and each expert's, turns by the same: whatever it is for and however large its gradient was.
        longest = optimizer.learning_rate * ADAMW_RMS * max(change.shape[-2:]) ** 0.5
        torch.testing.assert_close(
            torch.linalg.svdvals(change)[..., 0] / longest, torch.ones(change.shape[:-2]), atol=0.3, rtol=0
        )


def test_muon_is_refused_with_sharded_matrices(recipe, monkeypatch):
    monkeypatch.setattr(finetuning.LMTrainer, "_sharded", True)
    with pytest.raises(ModelError, match="muon, which needs whole matrices"):
        finetune(replace(recipe, optimizer=replace(recipe.optimizer, kind="muon")), log=print)


class StopAt(finetuning.RunClock):
    """A clock whose time is up after a number of steps."""

    def __init__(self, step, *given):
        super().__init__(*given)
        self.stop_step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.stop_step:
            control.should_save = control.should_training_stop = True


StopAt.__name__ = "RunClock"  # the name that its time is saved under


def test_the_time_limit_counts_resumed_parts(recipe):
    log = []
    recipe = replace(recipe, train=replace(recipe.train, max_minutes=1e-9))
    assert finetune(recipe, log=log.append).steps == 1
    assert any(line.startswith("time limit") for line in log)
    assert finetune(recipe, log=log.append, resume=True).steps == 1  # its time was up then


def test_rows_mode_moves_new_rows_only(recipe):
    for output, mode in (("rows", "rows"), ("lora", "lora")):
        spec = replace(recipe, mode=mode, lora=LORA if mode == "lora" else None, output=recipe.output + output)
        finetune(spec, log=print)
        old = AutoModelForCausalLM.from_pretrained(spec.llm).state_dict()
        new = AutoModelForCausalLM.from_pretrained(spec.output).state_dict()
        for name, before in old.items():
            same = torch.equal(new[name][: len(before)], before)
            adapted = mode == "lora" and "proj" in name
            assert same != adapted, name
        start = replace(spec, train=replace(spec.train, steps=1), output=recipe.output + output + "1")
        finetune(start, log=print)
        first = AutoModelForCausalLM.from_pretrained(start.output).state_dict()
        for table in ("model.embed_tokens.weight", "lm_head.weight"):
            assert not torch.equal(first[table][300:], new[table][300:])


def test_lora_round_trip(llm, text_tokenizer, tmp_path):
    offset = llm.get_input_embeddings().weight.shape[0]
    extend_tables(llm, len(text_tokenizer), 64, None, seed=0)
    model = choose_trained(llm, "lora", LORA, offset).train()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
    ids = torch.tensor([[0, 20, 9, offset, offset + 63, offset + 64]])
    untouched = model(ids).logits.detach()
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = model.eval()(ids).logits.detach()
    assert (expected - untouched).abs().max() > 1e-3
    model.merge_and_unload().save_pretrained(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.allclose(merged(ids).logits, expected, atol=1e-6)


def test_loss_is_that_of_the_labelled_positions(llm, text_tokenizer, vocabulary, recipe, tmp_path):
    extend_tables(llm, len(text_tokenizer), 64, None, seed=0)
    samples = Samples(recipe.data, text_tokenizer, vocabulary, seed=0)
    stream = iter(samples)
    batch = collate([next(stream) for _ in range(3)], pad_id=2)
    assert all(key.startswith("k") for key in batch.pop("keys"))
    trainer = DrawingTrainer(
        model=llm,
        args=training_arguments(recipe.optimizer, recipe.train, tmp_path / "t"),
        vocabulary=vocabulary,
        z_loss=0.0,
    )
    by_transformers = llm.eval()(**batch).loss
    assert torch.allclose(trainer.compute_loss(llm, batch), by_transformers, atol=1e-6)
    trainer.z_loss = 0.1
    assert trainer.compute_loss(llm, batch) > by_transformers + 0.1


def test_plan_counts_what_is_trained(recipe):
    text = AutoModelForCausalLM.from_pretrained(recipe.llm).num_parameters()
    rows = 2 * 66 * 16
    full = plan(recipe)
    assert full["parameters"] == full["trained_parameters"] == text + rows
    assert full["tokens_per_sample"] == 1 + 16 + 1 + 1 + 4 + 2 and full["images"] == 12
    assert plan(replace(recipe, mode="rows"))["trained_parameters"] == rows
    lora = plan(replace(recipe, mode="lora", lora=LORA))["trained_parameters"]
    assert rows < lora < text
    json.dumps(full)


def test_bad_inputs(recipe, tmp_path, token_set):
    with pytest.raises(ModelError, match=r"nowhere: no such folder"):
        finetune(replace(recipe, llm=str(tmp_path / "nowhere")), log=print)
    with pytest.raises(ModelError, match=r"a sample takes up to 609 tokens.*context is 256"):
        finetune(replace(recipe, data=replace(recipe.data, max_caption_tokens=600)), log=print)
    token_set(tmp_path / "others", digest="f" * 16)
    with pytest.raises(TokenFileError, match="encoded by tokenizer ffff"):
        finetune(replace(recipe, data=replace(recipe.data, token_sets=(str(tmp_path / "others"),))), log=print)


def test_checkpoints_hold_no_pickle_and_damage_is_found(recipe, tmp_path):
    recipe = replace(recipe, train=replace(recipe.train, keep_checkpoints=2))
    straight = finetune(recipe, log=print)
    checkpoints = Path(recipe.output, "checkpoints")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-3", "checkpoint-6"]
    kinds = {path.suffix for path in checkpoints.rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json"}
    with (checkpoints / "checkpoint-6" / "optimizer.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    log = []
    resumed = finetune(recipe, log=log.append, resume=True)
    assert any("checkpoint-6 is damaged (optimizer.safetensors has changed)" in line for line in log)
    assert any(line == f"resuming from {checkpoints / 'checkpoint-3'}" for line in log)
    assert resumed.train_loss == pytest.approx(straight.train_loss, abs=1e-6)
    for folder in checkpoints.iterdir():
        (folder / "sha256.json").unlink()
    with pytest.raises(ModelError, match="all 2 checkpoints are damaged"):
        finetune(recipe, log=print, resume=True)


def test_files_of_a_killed_save_are_removed(recipe):
    left = [Path(recipe.output, ".saving-killed", "half"), Path(recipe.output, "checkpoints/.partial/checkpoint-3")]
    for resume in (False, True):  # a run that continues, and one that had ended
        for folder in left:
            folder.mkdir(parents=True)
        finetune(recipe, log=print, resume=resume)
        assert not list(Path(recipe.output).rglob(".*"))


@pytest.mark.parametrize("point", POINTS)
def test_a_full_disk_leaves_earlier_checkpoints(recipe, tmp_path, point):
    train = replace(recipe.train, save_every=1, keep_checkpoints=9)
    with disk(tmp_path / "disk", 100 + 150 * point) as enlarge:
        recipe = replace(recipe, train=train, output=str(tmp_path / "disk" / "out"))
        with pytest.raises(ModelError, match="cannot be written"):
            finetune(recipe, log=print)
        found = list_checkpoints(Path(recipe.output, "checkpoints"))
        assert not Path(recipe.output, "config.json").exists()
        enlarge()
        log = []
        assert finetune(recipe, log=log.append, resume=True).steps == 6
        assert not found or f"resuming from {found[-1]}" in log


def test_another_recipe_or_number_of_processes_is_refused(recipe, monkeypatch):
    finetune(recipe, log=print)
    other = replace(recipe, optimizer=replace(recipe.optimizer, learning_rate=1e-5))
    with pytest.raises(ModelError, match=r"not that of this run \(optimizer.learning_rate: 0.001 before, 1e-05 now"):
        finetune(other, log=print, resume=True)
    monkeypatch.setattr("v2flow_cli.training.llm_trainer.world_size", lambda: 3)
    with pytest.raises(ModelError, match=r"saved by 1 processes, resumed by 3: dropout .* allow it with --approximate"):
        finetune(recipe, log=print, resume=True)
    log = []
    finetune(recipe, log=log.append, resume=True, approximate=True)
    assert any("approximate resume: 1 processes before, 3 now" in line for line in log)


def test_accumulation_does_not_change_the_training(recipe, tmp_path):
    """The loss is a mean over all labels of a step: micro-batches with fewer (captions as answers) weigh less."""
    data = replace(recipe.data, image_to_text_share=0.5)
    whole = replace(recipe, data=data, train=replace(recipe.train, batch_size=4))
    parts = replace(whole, train=replace(whole.train, accumulate=4), output=str(tmp_path / "parts"))
    reports = [finetune(spec, log=print) for spec in (whole, parts)]
    assert reports[0].train_loss == pytest.approx(reports[1].train_loss, abs=1e-5)
    assert torch.allclose(logits_of(whole.output), logits_of(parts.output), atol=1e-4)
    assert AutoModelForCausalLM.from_pretrained(whole.output).config.v2flow["captions"]


def test_sample_pictures_do_not_disturb_the_training(recipe, tmp_path):
    finetune(recipe, log=print)
    drawn = replace(recipe, output=str(tmp_path / "drawn"), sample_every=3, sample_prompts=("a red fox", "two dogs"))
    finetune(drawn, log=print)
    found = sorted(path.relative_to(drawn.output).as_posix() for path in Path(drawn.output).glob("samples/**/*.png"))
    names = ["a-red-fox-t1-s0.png", "two-dogs-t1-s0.png"]
    assert found == [f"samples/step-{step:08d}/{name}" for step in (3, 6) for name in names]
    assert torch.equal(logits_of(recipe.output), logits_of(drawn.output))


def test_photos_instead_of_tokens(recipe, tmp_path, sample_images):
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(sample_images):
        image.save(tmp_path / f"photos/{i}.png")
        (tmp_path / f"photos/{i}.txt").write_text(f"photo {i}")
    data = replace(recipe.data, token_sets=(), photos=(str(tmp_path / "photos"),))
    assert plan(replace(recipe, data=data))["images"] == len(sample_images)
    report = finetune(replace(recipe, data=data), log=print)
    assert report.steps == 6 and not Path(recipe.output, "token_counts.npy").exists()


def spoil_steps(monkeypatch, trainer, bad, spoil=lambda loss: loss * math.nan):
    """Have ``spoil`` change the training loss of the steps ``bad``."""
    plain = trainer.compute_loss

    def compute_loss(self, model, *args, **kwargs):
        loss = plain(self, model, *args, **kwargs)
        return spoil(loss) if model.training and self.state.global_step in bad else loss

    monkeypatch.setattr(trainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("bad", [{1}, {3}, {2, 5}])
def test_resume_equals_not_stopping_across_skipped_steps(recipe, tmp_path, monkeypatch, bad):
    spoil_steps(monkeypatch, DrawingTrainer, bad)
    recipe = replace(recipe, train=replace(recipe.train, skip_bad_steps=2, log_every=4, accumulate=2))
    stopped, logs, histories = replace(recipe, output=str(tmp_path / "stopped")), [], []
    finetune(recipe, log=logs.append)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning, "RunClock", lambda *given: StopAt(3, *given))
        finetune(stopped, log=print)
    finetune(stopped, log=print, resume=True)
    assert torch.equal(logits_of(recipe.output), logits_of(stopped.output))
    for spec in (recipe, stopped):
        state = json.loads(Path(spec.output, "checkpoints/checkpoint-6/trainer_state.json").read_text())
        assert state["stateful_callbacks"]["RunClock"]["attributes"]["bad_steps"] == len(bad)
        histories.append(state["log_history"])
    assert histories[0] == histories[1] and all(math.isfinite(v) for line in histories[0] for v in line.values())
    skipped = [line for line in logs if "skipped" in line]
    assert [line.split(",")[0] for line in skipped] == [f"step {step}" for step in sorted(bad)]
    assert re.search(r"rank 0: the loss is not finite \(nan\) on samples k\d+, k\d+; skipped, 1 of 2$", skipped[0])


def test_a_skipped_step_changes_no_state(recipe, monkeypatch):
    # Its value is finite, its gradient is not.
    spoil_steps(monkeypatch, DrawingTrainer, {0, 3}, lambda loss: loss + (loss - loss.detach()).sqrt())
    train = replace(recipe.train, skip_bad_steps=2, save_every=1, keep_checkpoints=9)
    log = []
    finetune(replace(recipe, train=train), log=log.append)
    assert any(re.search(r"step 3, rank 0: the gradient is not finite on samples k.*; skipped, 2 of 2", s) for s in log)
    for name in ("model.safetensors", "optimizer.safetensors"):
        steps = [Path(recipe.output, f"checkpoints/checkpoint-{step}", name).read_bytes() for step in (2, 3, 4)]
        assert steps[0] != steps[1] == steps[2]


def test_more_bad_steps_than_may_be_skipped(recipe, monkeypatch):
    spoil_steps(monkeypatch, DrawingTrainer, {1, 4})
    recipe = replace(recipe, train=replace(recipe.train, skip_bad_steps=1))
    with pytest.raises(SharedError, match=r"step 4, .* Resume from .*, or allow train.skip_bad_steps"):
        finetune(recipe, log=print)
    log = []
    with pytest.raises(SharedError, match="step 4, "):  # the count outlives a resume
        finetune(recipe, log=log.append, resume=True)
    assert not any("skipped" in line for line in log)
    more = replace(recipe, train=replace(recipe.train, skip_bad_steps=2))
    assert finetune(more, log=print, resume=True).steps == 6


@pytest.fixture
def launch(recipe, tmp_path, monkeypatch):
    """Two ranks; ``spoil()`` has the last word on the losses of rank 1 in its third pass: (codes, their errors).

    The ranks leave what they logged in ``0.log`` and ``1.log``, and a digest of their weights in ``0.digest``, ...
    """

    def run(spoil, **train_settings):
        passes, plain = [], finetuning.labelled_losses

        def losses(model, *args):
            found = plain(model, *args)
            passes.append(1)
            if os.environ["RANK"] == "1" and model.training and len(passes) == 3:
                found = found._replace(losses=spoil(found.losses))
            return found

        def train():
            AcceleratorState._reset_state(True)
            with (tmp_path / f"{os.environ['RANK']}.log").open("w") as log:
                finetune(replace(recipe, train=replace(recipe.train, **train_settings)), log=partial(print, file=log))

        def save(trainer, model, *args):
            (tmp_path / f"{os.environ['RANK']}.digest").write_text(weights_digest(model.state_dict()))
            save_folder(trainer, model, *args)

        monkeypatch.setattr(finetuning, "save_folder", save)
        monkeypatch.setattr(finetuning, "labelled_losses", losses)
        codes = wait(ranks(train, 2, errors=tmp_path), 60)
        return codes, [path.read_text() for path in sorted(tmp_path.glob("?.txt"))]

    return run


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_by_name(launch):
    codes, errors = launch(lambda losses: losses * math.nan)
    assert codes == [1, 1] and errors[0] == errors[1]
    assert re.search(r"SharedError: step 2, rank 1: the loss is not finite \(nan\) on samples k\d+", errors[0])


def test_a_bad_step_of_one_rank_is_skipped_by_both(launch, tmp_path):
    assert launch(lambda losses: losses * math.nan, skip_bad_steps=1, save_every=1, keep_checkpoints=9) == ([0, 0], [])
    logs, digests = ([(tmp_path / f"{rank}.{kind}").read_text() for rank in (0, 1)] for kind in ("log", "digest"))
    for log in logs:
        assert re.search(r"step 2, rank 1: the loss is not finite \(nan\) on samples k\d+; skipped, 1 of 1\n", log)
        assert "loss nan" not in log and "step 6/6" in log
    assert digests[0] == digests[1]
    weights = [(tmp_path / f"out/checkpoints/checkpoint-{n}/model.safetensors").read_bytes() for n in (2, 3, 4)]
    assert weights[0] == weights[1] != weights[2]


def test_a_killed_rank_stops_the_other(launch):
    codes, errors = launch(lambda losses: os.kill(os.getpid(), signal.SIGKILL))
    assert codes == [1, -signal.SIGKILL]
    assert re.search(r"V2FlowError: step 2, rank 0 on samples k\d+.*: lost contact with another process", errors[0])


@pytest.mark.slow
def test_two_processes_train_as_one(recipe, tmp_path):
    """Two gloo processes and one alone, on the same recipe: the same weights up to rounding."""
    recipe = replace(recipe, data=replace(recipe.data, image_to_text_share=0.4, held_out_share=0.2))
    recipe = replace(recipe, train=replace(recipe.train, batch_size=4, accumulate=2))
    alone = finetune(recipe, log=print)
    together = replace(recipe, output=str(tmp_path / "together"))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(together))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "v2flow_cli.cli.app", "finetune-llm", str(tmp_path / "recipe.yaml"), "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.strip().splitlines()  # the first process alone speaks
    assert json.loads(line)["train_loss"] == pytest.approx(alone.train_loss, abs=1e-4)
    assert "2 process(es) on " in Path(together.output, "README.md").read_text()
    assert torch.allclose(logits_of(recipe.output), logits_of(together.output), atol=1e-4)
    generators = Path(together.output, "checkpoints/checkpoint-6").glob("rng-*.safetensors")
    assert {path.name for path in generators} == {"rng-0.safetensors", "rng-1.safetensors"}
