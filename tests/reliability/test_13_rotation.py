"""13. The rotation of checkpoints removes no good one in favour of a damaged one, and a kill in it loses none."""

import dataclasses
import shutil
import signal
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.llm.conftest import llm_folder, recipe, text_tokenizer, token_set  # noqa: F401  (fixtures)
from tests.reliability.processes import fork, killed_at, wait
from tests.training.conftest import quiet, world  # noqa: F401  (a fixture)
from tests.training.conftest import recipe as training_recipe
from v2flow_cli.errors import ModelError
from v2flow_cli.training import checkpoint, llm_checkpoints
from v2flow_cli.training.checkpoint import load_newest, save_checkpoint
from v2flow_cli.training.loop import train
from v2flow_cli.training.objectives.drawing import finetune


@pytest.fixture(params=["train", "finetune-llm"])
def training(request, tmp_path):
    """``training(changes of train)`` goes on in ``tmp_path``/out; its checkpoints are of every second step to 8."""
    if request.param == "train":
        tree = training_recipe(request.getfixturevalue("world"), "autoencoder", tmp_path / "out")
        command = train
    else:
        tree, command = request.getfixturevalue("recipe"), finetune

    def run(**changes):
        AcceleratorState._reset_state(True)
        changes = {"steps": 8, "save_every": 2, "keep_checkpoints": 3, **changes}
        command(dataclasses.replace(tree, train=dataclasses.replace(tree.train, **changes)), resume=True, log=quiet)

    return run


def intact(root):
    """The steps of the checkpoints whose files are those that were written; read anew each time."""
    found = set()
    for folder in root.iterdir():
        if folder.name.startswith(("step-", "checkpoint-")):
            problem = checkpoint._damage if folder.name.startswith("step-") else llm_checkpoints.damage
            found |= set() if problem(folder) else {int(folder.name.split("-")[1])}
    return found


def damage(root, step):
    (folder,) = [f for f in root.iterdir() if f.name.split("-")[-1].lstrip("0") == str(step)]
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize("every", [pytest.param(40, id="few"), pytest.param(3, id="many", marks=pytest.mark.slow)])
def test_killed_while_damaged_checkpoints_are_passed(training, tmp_path, every):
    """6 and 8 are damaged, so the run goes on from 4, and saves at 7 with the damaged 6 below it: 4 has to stay."""
    root = tmp_path / "out" / "checkpoints"
    assert wait([fork(training)], 120) == [0]
    assert intact(root) == {4, 6, 8}
    for step in (6, 8):
        damage(root, step)
    shutil.copytree(tmp_path / "out", tmp_path / "before")
    again = partial(training, save_every=7, keep_checkpoints=2)
    for number in range(1, 1000, every):
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "before", tmp_path / "out")
        (code,) = wait([fork(partial(killed_at, number, root, again))], 120)
        found = intact(root)
        assert 4 in found or found >= {7, 8}  # the newest two that are whole
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert wait([fork(again)], 120) == [0]
        assert intact(root) >= {7, 8}  # and 4, where the kill came after the last save
    assert code == 0 and found == {7, 8}, found


def test_a_good_checkpoint_outlives_a_damaged_one(tmp_path):
    """In a second process, which knows of none of them whether it is whole."""

    def save(step, keep):
        save_checkpoint(tmp_path / "c", step, {"model": {"w": torch.full((3,), float(step))}}, {"n": step}, keep)

    def check():
        assert load_newest(tmp_path / "c")[2] == {"n": 1}
        for step, left in ((4, {1, 4}), (5, {4, 5})):
            save(step, 2)
            assert intact(tmp_path / "c") == left

    for step in (1, 2, 3):
        save(step, 3)
    for step in (2, 3):
        damage(tmp_path / "c", step)
    checkpoint._KNOWN_INTACT.clear()
    check()
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step-00000004", "step-00000005"]
    for step in (4, 5):
        damage(tmp_path / "c", step)
    with pytest.raises(ModelError, match="all 2 checkpoints are damaged"):
        load_newest(tmp_path / "c")


def test_checkpoints_of_an_llm(tmp_path):
    """The same for ``seal``."""

    def seal(step, keep):
        folder = tmp_path / "c" / ".partial" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights %d" % step)
        llm_checkpoints.seal(folder, tmp_path / "c", keep)

    for step in (1, 2, 3):
        seal(step, 3)
    for step in (2, 3):
        damage(tmp_path / "c", step)
    checkpoint._KNOWN_INTACT.clear()
    for step, left in ((4, {1, 4}), (5, {4, 5})):
        seal(step, 2)
        assert intact(tmp_path / "c") == left
    assert checkpoint.newest_checkpoint(tmp_path / "c", llm_checkpoints.damage, quiet).name == "checkpoint-5"
