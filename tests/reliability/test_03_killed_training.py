"""3. Training killed with SIGKILL at any moment and resumed ends as if nothing had happened, bit for bit."""

import json
import os
import random
import signal
import sys
import time
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from tests.llm.conftest import SENTENCES, make_llm, write_token_set
from tests.reliability.processes import fork, wait
from v2flow_cli.recipe import load_recipe
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.training.loop import train
from v2flow_cli.training.objectives.drawing import finetune
from v2flow_cli.training.objectives.language_model import pretrain, train_tokenizer

from ..conftest import RECIPES

STEPS = 12
# Saves fall between log lines, and a pass over the data ends between saves.
LOOP = [f"train.steps={STEPS}", "train.save_every=3", "train.log_every=4"]
CLOCKS = ("images_per_second", "data_wait_share", "seconds", "peak_gib")  # of the machine, not of the training
CLOCKS += ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


@pytest.fixture(params=["train", "finetune-llm", "finetune-llm-from-text"])
def start(request, tmp_path):
    """The function ``start(output)`` that trains, or goes on, into the folder ``output`` of ``tmp_path``."""
    if request.param == "train":
        (tmp_path / "photos").mkdir()
        for i, image in enumerate(request.getfixturevalue("sample_images")):
            image.resize((40, 36)).save(tmp_path / "photos" / f"{i}.png")
        file, command = "autoencoder.yaml", train
        changes = [f"data.sources=[{tmp_path / 'photos'}]", "data.crop_size=16", "train.batch_size=2"]
    elif request.param == "finetune-llm":
        tokenizer = request.getfixturevalue("tiny_tokenizer_folder")
        digest = V2FlowTokenizer.from_pretrained(tokenizer).token_digest
        write_token_set(tmp_path / "tokens", digest=digest)
        words = train_tokenizer(SENTENCES * 3, 300)
        for part in (words, make_llm("llama", len(words))):
            part.save_pretrained(tmp_path / "llama")
        file, command = "llm.yaml", finetune
        changes = [f"llm={tmp_path / 'llama'}", f"tokenizer={tokenizer}", f"data.token_sets=[{tmp_path / 'tokens'}]"]
        changes += ["mode=lora", "lora={rank: 2, alpha: 4.0, dropout: 0.2}", "train.batch_size=4", "train.accumulate=2"]
        changes += ["data.held_out_share=0.2", "train.eval_every=5"]
    else:
        (tmp_path / "text.txt").write_text("\n".join(f"a red fox number {i} runs" for i in range(30)))
        file, command = "lm.yaml", pretrain
        changes = [f"text=[{tmp_path / 'text.txt'}]", "train.batch_size=4", "train.eval_every=5"]

    def run(output):
        AcceleratorState._reset_state(True)
        recipe = load_recipe(RECIPES / "tiny" / file, [*changes, *LOOP, f"output={tmp_path / output}"])
        command(recipe, resume=True, log=lambda message: None)

    return run


def final_state(folder):
    """Everything that a run leaves, but for clocks: the model, weights, average, optimizer and generators; the log."""
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    tensors = {f"{f.name}/{k}": v for f in newest.glob("*.safetensors") for k, v in load_file(f).items()}
    tensors |= {f"exported/{k}": v for k, v in load_file(folder / "model.safetensors").items()}
    if (folder / "metrics.jsonl").exists():
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    else:
        log = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return newest.name, tensors, [{k: v for k, v in line.items() if k not in CLOCKS} for line in log]


def killed_at_file(number, run):
    """``run`` in a process that kills itself when it is about to open, rename or remove checkpoint file ``number``."""
    seen = []

    def hook(event, args):
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and "checkpoints" in str(args[0]):
            seen.append(event)
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    run()


@pytest.mark.parametrize("kills", [pytest.param(3, id="3"), pytest.param(30, id="30", marks=pytest.mark.slow)])
def test_killed_and_resumed(start, tmp_path, kills):
    begun = time.monotonic()
    assert wait([fork(partial(start, "whole"))], 120) == [0]
    seconds = time.monotonic() - begun
    name, tensors, log = final_state(tmp_path / "whole")
    assert int(name.split("-")[1]) == STEPS and [line["step"] for line in log if "eval_loss" not in line] == [4, 8, 12]
    rng, killed, output = random.Random(0), 0, 0
    while killed < kills:  # each output is killed up to five times, then left to end
        for _ in range(min(5, kills - killed)):
            run = partial(start, str(output))
            if killed % 3 == 1:  # while it reads or writes checkpoints; it may end before it gets there
                assert wait([fork(partial(killed_at_file, rng.randrange(1, 60), run))], 120) in ([-signal.SIGKILL], [0])
            else:
                pid = fork(run)
                time.sleep(rng.uniform(0.0, 1.1 * seconds))
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            killed += 1
        assert wait([fork(partial(start, str(output)))], 120) == [0]
        found = final_state(tmp_path / str(output))
        assert found[0] == name and found[2] == log
        assert found[1].keys() == tensors.keys()
        assert [k for k, v in found[1].items() if not torch.equal(tensors[k], v)] == []
        output += 1
