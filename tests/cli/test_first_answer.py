"""What a first answer waits for: the modules that a command imports (no times: those depend on the machine)."""

import gc
import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from v2flow_cli.cli.first_answer import without_collection

# Each takes as long to import as a good part of torch, or is of use to other commands alone.
HEAVY = (
    "accelerate datasets diffusers lpips pandas peft scipy skimage sklearn sympy timm torch._dynamo torch._inductor "
    "torch.distributed.tensor torch_fidelity torchmetrics torchvision transformers.modeling_utils webdataset"
).split()

RUN = """
import gc, json, sys
from v2flow_cli.cli.app import app
for arguments in json.loads(sys.argv[1]):
    app(arguments, standalone_mode=False)
tracked = {id(module) for module in gc.get_objects()}
searched = [name for name, module in sys.modules.items() if id(module) in tracked]
print(json.dumps([sorted(sys.modules), searched, gc.isenabled()]))
"""


def in_new_process(*commands: list[str]) -> tuple[set[str], set[str]]:
    """The modules that the commands import, and those that the garbage collector searches afterwards."""
    done = subprocess.run([sys.executable, "-c", RUN, json.dumps(commands)], capture_output=True, text=True)
    assert done.returncode == 0 and "leaked" not in done.stderr, done.stderr
    imported, searched, collects = json.loads(done.stdout.splitlines()[-1])
    assert collects
    return set(imported), set(searched)


def test_encode_and_decode_import_what_they_use(tmp_path, tiny_tokenizer_folder):
    Image.effect_noise((40, 48), 60).convert("RGB").save(tmp_path / "a.jpg")
    model = ["--model", str(tiny_tokenizer_folder)]
    commands = [
        ["encode", str(tmp_path / "a.jpg"), "-o", str(tmp_path / "tokens"), *model],
        ["decode", str(tmp_path / "tokens"), "-o", str(tmp_path / "decoded"), *model],
    ]
    imported, searched = in_new_process(*commands)
    assert (tmp_path / "decoded" / "a.png").is_file() and "torch" in imported
    assert [name for name in HEAVY if name in imported] == []
    assert "torch" not in searched


def test_generate_imports_without_garbage_collections(tmp_path):
    imported, searched = in_new_process(["generate", "a red fox", "-o", str(tmp_path)])
    assert {"torch", "transformers.modeling_utils"} <= imported
    assert not {"torch", "transformers.modeling_utils"} & searched


def test_only_the_first_block_of_a_process_keeps_what_it_imports(monkeypatch):
    calls = []
    monkeypatch.setattr(gc, "freeze", lambda: calls.append("freeze"))
    monkeypatch.setattr(gc, "get_freeze_count", lambda: len(calls))
    with pytest.raises(ImportError), without_collection():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    with without_collection():
        assert gc.isenabled()
    assert calls == ["freeze"]


def test_a_collector_that_is_off_stays_off():
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


LEAVE = """
import atexit, gc, sys, threading, time
from v2flow_cli.cli.first_answer import leave, without_collection
class Kept:
    def __del__(self): print("freed")
kept = Kept()
atexit.register(lambda: print("exit handler"))
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
if sys.argv[1] == "after":
    with without_collection(): pass
try:
    sys.exit(3)
except SystemExit as end:
    leave(end)
    raise
"""


@pytest.mark.parametrize(("when", "more"), [("after", []), ("before", ["freed"])])
def test_the_end_of_a_process_runs_handlers_and_frees_no_objects_one_by_one(when, more):
    done = subprocess.run([sys.executable, "-c", LEAVE, when], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split("\n")[:-1], done.stderr) == (3, ["thread", "exit handler", *more], "")


def test_output_that_cannot_be_written_at_the_end_is_reported_as_python_does():
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", LEAVE, "after"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=buffered)
    assert done.returncode == 120 and "No space left on device" in done.stderr
