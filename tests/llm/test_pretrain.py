import gzip
import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from v2flow_cli.errors import DataError, ModelError
from v2flow_cli.recipe.load import load_recipe
from v2flow_cli.training import llm_trainer
from v2flow_cli.training.llm_trainer import LMTrainer
from v2flow_cli.training.objectives.language_model import (
    find_text,
    pack,
    plan,
    pretrain,
    read_documents,
    train_tokenizer,
)


@pytest.fixture
def recipe(request, tmp_path):
    lines = [f"caption {i}: a red fox number {i * i} runs over {i} fields" for i in range(200)]
    (tmp_path / "captions.txt").write_text("\n".join(lines))
    settings = [f"text=[{tmp_path}/*.txt]", f"output={tmp_path / 'lm'}"]
    return load_recipe(request.config.rootpath / "recipes/tiny/lm.yaml", settings)


def test_documents_are_lines_or_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_text("one fox\ntwo  foxes\n")
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write("\ufeffa first\nparagraph\n\nand a second\n")
    paths = find_text([f"{tmp_path}/a.txt", f"{tmp_path}/*.gz"])
    assert list(read_documents(paths)) == ["one fox", "two foxes", "a first paragraph", "and a second"]


def test_blocks_are_packed_with_bos_and_eos():
    documents = ["aa", "b", "<|eos|>"]
    tokenizer = train_tokenizer(documents, 300)
    table = pack(documents, tokenizer, 2)
    flat = table.flatten().tolist()
    assert flat[0] == 0 and flat.count(0) == 3 and flat.count(1) >= 2  # the spelt <|eos|> is not one of them
    assert tokenizer.decode(flat).startswith("<|bos|>aa<|eos|><|bos|>b<|eos|><|bos|><|eos|>")
    assert len(pack(documents, tokenizer, 7)) == len(flat) // 7


def test_the_saved_folder_has_a_card_with_its_figures(recipe):
    report = pretrain(replace(recipe, train=replace(recipe.train, steps=60, save_dtype="bf16")), log=print)
    model, tokenizer = (c.from_pretrained(recipe.output) for c in (AutoModelForCausalLM, AutoTokenizer))
    assert model.dtype == torch.bfloat16 and model.config.use_cache
    assert model.config.bos_token_id == tokenizer.bos_token_id == 0
    assert report.eval_loss < 4.5 < 5.7 < torch.tensor(float(len(tokenizer))).log()  # it has learned
    card = open(f"{recipe.output}/README.md").read()
    assert f"{report.eval_loss:.3f} nats" in card and str(recipe.output) not in card
    turn = [{"role": "user", "content": "a fox"}, {"role": "assistant", "content": "it runs"}]
    assert tokenizer.apply_chat_template(turn, tokenize=False) == "<|bos|>a fox\nit runs<|eos|>"


def test_a_bad_step_is_skipped_also_just_after_a_resume(recipe, tmp_path, monkeypatch):
    plain = LMTrainer.compute_loss

    def compute_loss(self, model, *args, **kwargs):
        loss = plain(self, model, *args, **kwargs)
        return loss * torch.nan if model.training and self.state.global_step == 4 else loss

    monkeypatch.setattr(LMTrainer, "compute_loss", compute_loss)
    loop = replace(recipe.train, steps=8, save_every=4, log_every=3, keep_checkpoints=2, skip_bad_steps=1)
    recipe, checkpoints = replace(recipe, train=loop), tmp_path / "lm" / "checkpoints"
    histories = []
    for _ in range(2):
        log = []
        assert pretrain(recipe, log=log.append, resume=True).steps == 8
        assert any("step 4, rank 0: the loss is not finite (nan); skipped, 1 of 1" in line for line in log)
        histories.append(json.loads((checkpoints / "checkpoint-8/trainer_state.json").read_text())["log_history"])
        shutil.rmtree(checkpoints / "checkpoint-8")
    assert histories[0] == histories[1] and [line["step"] for line in histories[0]] == [3, 6, 8]
    assert all(line["loss"] == line["loss"] for line in histories[0])


def test_resume_equals_not_stopping(recipe, tmp_path):
    long = replace(recipe, train=replace(recipe.train, steps=8, save_every=4, keep_checkpoints=2))
    pretrain(long, log=print)
    folder = tmp_path / "lm"
    weights = [AutoModelForCausalLM.from_pretrained(folder).state_dict()]
    for path in [*folder.glob("checkpoints/checkpoint-8/*"), *folder.glob("*.*")]:
        path.unlink()
    (folder / "checkpoints/checkpoint-8").rmdir()
    log = []
    assert pretrain(long, log=log.append, resume=True).steps == 8
    assert any("checkpoint-4" in line for line in log)
    weights.append(AutoModelForCausalLM.from_pretrained(folder).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_checkpoint_keeps_the_last_log_lines(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(llm_trainer, "LOG_LINES", 3)
    lines = []
    pretrain(replace(recipe, train=replace(recipe.train, steps=6, save_every=6, log_every=1)), log=lines.append)
    assert sum(line.startswith("step ") for line in lines) == 7  # the log has all of them, and the held-out loss
    state = json.loads((tmp_path / "lm/checkpoints/checkpoint-6/trainer_state.json").read_text())
    assert [line["step"] for line in state["log_history"]] == [4, 5, 6]


def test_plan_counts_parameters(recipe):
    estimates = plan(recipe)
    pretrained = pretrain(replace(recipe, train=replace(recipe.train, steps=1)), log=print)
    assert estimates["parameters"] == pretrained.parameters and estimates["tokens_per_step"] == 4 * 32


def test_a_run_shorter_than_log_every_has_a_loss_too(recipe):
    report = pretrain(replace(recipe, train=replace(recipe.train, steps=1, log_every=20)), log=print)
    assert 4 < report.train_loss < 8


def test_bad_inputs(recipe, tmp_path):
    with pytest.raises(DataError, match=r"none\*\.txt matches no file.*--set"):
        pretrain(replace(recipe, text=(f"{tmp_path}/none*.txt",)), log=print)
    (tmp_path / "fake.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"fake\.gz: not readable as UTF-8 text"):
        pretrain(replace(recipe, text=(f"{tmp_path}/fake.gz",)), log=print)
    (tmp_path / "short.txt").write_text("one line")
    with pytest.raises(DataError, match="fewer than one batch of 4 blocks"):
        pretrain(replace(recipe, text=(f"{tmp_path}/short.txt",)), log=print)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"a file; expected a folder.*--set output="):
        pretrain(replace(recipe, output=str(tmp_path / "file")), log=print)
