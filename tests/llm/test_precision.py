"""Language models where bf16 is fast, without the packages that only other commands need, and their saved tables."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Trainer

from v2flow_cli.recipe.load import dump_recipe, load_recipe
from v2flow_cli.runtime import device
from v2flow_cli.training.objectives.drawing import finetune
from v2flow_cli.training.objectives.language_model import pretrain


@pytest.fixture
def lm_recipe(request, tmp_path):
    lines = [f"caption {i}: a red fox number {i * i} runs over {i} fields" for i in range(200)]
    (tmp_path / "captions.txt").write_text("\n".join(lines))
    settings = [f"text=[{tmp_path}/*.txt]", f"output={tmp_path / 'lm'}", "train.steps=2"]
    return load_recipe(request.config.rootpath / "recipes/tiny/lm.yaml", settings)


def auto(recipe, **changes):
    return replace(recipe, train=replace(recipe.train, steps=2, precision="auto", save_dtype="bf16", **changes))


def test_language_models_train_in_bf16(lm_recipe, recipe, monkeypatch):
    monkeypatch.setattr(device, "_bf16_is_fast", lambda device_type: True)
    seen, plain = [], Trainer.training_step
    monkeypatch.setattr(
        Trainer, "training_step", lambda self, *given: (seen.append(self.args.bf16), plain(self, *given))[1]
    )
    assert pretrain(auto(lm_recipe), log=print).steps == 2
    assert finetune(auto(recipe), log=print).steps == 2
    muon = replace(recipe, output=f"{recipe.output}-muon", optimizer=replace(recipe.optimizer, kind="muon"))
    assert finetune(auto(muon), log=print).steps == 2
    assert seen and all(seen)


@pytest.mark.parametrize("save_dtype", ["fp32", "bf16"])
def test_tied_tables_are_saved_once(recipe, llm_folder, save_dtype):
    made = replace(recipe, llm=str(llm_folder("qwen")), train=replace(recipe.train, steps=1, save_dtype=save_dtype))
    finetune(made, log=print)
    with safe_open(Path(made.output, "model.safetensors"), framework="pt") as file:
        names = list(file.keys())
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    model = AutoModelForCausalLM.from_pretrained(made.output)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.isfinite(model(torch.tensor([[0, 20]])).logits).all()


def test_checkpoints_come_by_minutes(lm_recipe):
    """Every step takes longer than ``save_minutes``."""
    loop = replace(lm_recipe.train, steps=3, save_every=0, save_minutes=1e-9, keep_checkpoints=9)
    pretrain(replace(lm_recipe, train=loop), log=print)
    assert len(list(Path(lm_recipe.output, "checkpoints").glob("checkpoint-*"))) == 3
    rare = replace(lm_recipe, output=f"{lm_recipe.output}-rare", train=replace(loop, save_minutes=60.0))
    pretrain(rare, log=print)
    assert [path.name for path in Path(rare.output, "checkpoints").iterdir()] == ["checkpoint-3"]


BLOCKED = ("diffusers", "lpips", "torch_fidelity", "webdataset")


def test_training_needs_no_package_of_other_commands(tmp_path, lm_recipe, recipe, request):
    """One step of all four kinds in a process that cannot import what only bench, shard and hub autoencoders need."""
    from v2flow_cli.assets import sample_photos

    photos = tmp_path / "photos"
    photos.mkdir()
    for name, image in sample_photos():
        image.resize((96, 80)).save(photos / f"{name}.png")
    recipes, tiny = [], request.config.rootpath / "recipes" / "tiny"
    plain = [f"data.sources=[{photos}]", "train.steps=1"]
    recipes.append(load_recipe(tiny / "autoencoder.yaml", [*plain, f"output={tmp_path / 'ae'}"]))
    recipes.append(replace(lm_recipe, train=replace(lm_recipe.train, steps=1)))
    models = [f"latents.autoencoder={tmp_path / 'ae'}", f"vocabulary.llm={tmp_path / 'lm'}"]
    recipes.append(load_recipe(tiny / "tokenizer.yaml", [*plain, *models, f"output={tmp_path / 't'}"]))
    recipes.append(replace(recipe, train=replace(recipe.train, steps=1)))
    commands = ["train", "finetune-llm", "train", "finetune-llm"]
    lines = [f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r}))", "from v2flow_cli.cli.app import app"]
    for number, (command, made) in enumerate(zip(commands, recipes)):
        file = tmp_path / f"{number}.yaml"
        file.write_text(dump_recipe(made))
        lines.append(f"app([{command!r}, {str(file)!r}], standalone_mode=False)")
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(Path(made.output, "model.safetensors").exists() for made in recipes)
