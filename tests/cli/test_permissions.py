"""Folders and files without permission: one sentence, exit code 1, and nothing is lost."""

import shutil
import stat
from pathlib import Path

import pytest

from tests.cli.test_streams import COMMANDS, MODELS, TINY, V2FLOW, llm_folder, world  # noqa: F401  (fixtures)
from tests.commands import obey_permissions, run
from tests.reliability.processes import content, fork, wait

TARS = f"train {TINY}/autoencoder.yaml --set data.sources=[tars] --set output=out --set data.crop_size=16"
ENCODE = COMMANDS["encode"][0]
OUTPUTS = [*(name for name in COMMANDS if name in "shard encode decode generate train finetune-llm budget".split())]
OUTPUTS += ["bench", "bench draw", "bench join"]
# Arguments, the file or folder without permission, and a part of the error.
INPUTS = [
    ("encode", ENCODE, "in/dog.png", "left out: in/dog.png: cannot be read (Permission denied)."),
    ("encode", ENCODE, "in", "error: in: cannot be read (Permission denied)."),
    ("encode", ENCODE, "model", "error: model: cannot be read (Permission denied)."),
    (
        "encode",
        ENCODE,
        "model/model.safetensors",
        "error: model/model.safetensors: cannot be read (Permission denied).",
    ),
    ("encode", ENCODE, "model/config.json", "error: model: not a loadable v2flow tokenizer (Permission denied)."),
    ("encode", "encode tars -o out --model model", "tars", "error: tars: cannot be read (Permission denied)."),
    ("encode", "encode tars -o out --model model --verify full", "tars/shard-000000.tar", "shard-000000.tar"),
    ("shard", COMMANDS["shard"][0], "in/dog.txt", "in/dog.txt: cannot be read (Permission denied)."),
    (
        "shard",
        "shard in -o out --captions t.csv",
        "t.csv",
        "error: t.csv: cannot be read as UTF-8 text (Permission denied).",
    ),
    (
        "shard",
        "shard tars --check full",
        "tars/shard-000000.tar",
        "error: tars: differs from its manifest; the full check",
    ),
    ("decode", COMMANDS["decode"][0], "tokens/dog.npy", "left out: tokens/dog.npy: not a complete .npy of token ids"),
    ("generate", COMMANDS["generate"][0], "prompts.txt", "path 'prompts.txt' is not readable"),
    ("generate", COMMANDS["generate"][0], "drawer/model.safetensors", "drawer/model.safetensors: cannot be read"),
    (
        "train",
        COMMANDS["train"][0],
        "in/dog.png",
        "error: in/dog.png: cannot be read (Permission denied). This exceeds",
    ),
    ("train", TARS, "tars/shard-000000.tar", "shard-000000.tar/dog: cannot be read (Permission denied)"),
    ("finetune-llm", COMMANDS["finetune-llm"][0], "pairs/shard.npy", "error: pairs/shard.npy: not a complete .npy"),
    ("bench", COMMANDS["bench"][0], "in/dog.png", "left out: in/dog.png: cannot be read (Permission denied)."),
    ("bench llm", f"bench llm in {MODELS}", "in/dog.txt", "error: in/dog.txt: cannot be read (Permission denied)."),
    (
        "bench draw",
        COMMANDS["bench draw"][0],
        "features.safetensors",
        "features.safetensors: cannot be read (Permission denied).",
    ),
    ("budget", COMMANDS["budget"][0], "budget.yaml", "path 'budget.yaml' is not readable"),
]
EVERYDAY = {ENCODE, "shard tars --check full", COMMANDS["generate"][0], COMMANDS["bench draw"][0], TARS}


@pytest.fixture(scope="module", autouse=True)
def obeying():
    if wait([fork(obey_permissions)], 60) != [0]:
        pytest.skip("this system does not let root obey permissions")


@pytest.fixture(scope="module")
def files(world):  # noqa: F811
    """The inputs of all commands, with models that belong to this test, and a set of tars."""
    shutil.copytree(world / "tokenizer", world / "model")
    shutil.copytree(world / "llm", world / "drawer")
    (world / "t.csv").write_text("file,caption\ndog.png,a dog\n")
    assert run(V2FLOW, "shard", "in", "-o", "tars", cwd=world).code == 0
    return world


def refused(files, words, message):
    ended = run(V2FLOW, *words.split(), cwd=files, obeys=True)
    assert ended.code == (2 if "is not readable" in message else 1) and "Traceback" not in ended.err, ended
    assert sum(line.lower().startswith("error: ") for line in ended.err.splitlines()) == 1, ended
    assert message in ended.err, ended


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n[:5] == "bench" else pytest.mark.slow) for n in OUTPUTS])
def test_an_output_folder_that_cannot_be_written(files, name):
    out = files / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    (out / "mine").write_text("mine")
    out.chmod(0o555)
    try:
        refused(files, COMMANDS[name][0], "cannot be written")
    finally:
        out.chmod(0o755)
    assert content(out) == {"mine": b"mine"}


def test_a_budget_and_a_bench_say_so_before_they_begin(files):
    out = files / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(0o555)
    for name, message in (("budget", "folder out: cannot be written"), ("bench", "out/t.csv: cannot be written")):
        ended = run(V2FLOW, *COMMANDS[name][0].split(), cwd=files, obeys=True)
        assert ended.code == 1 and ended.err == f"error: {message} (Permission denied).\n"
    (out / "t.csv").mkdir()
    ended = run(V2FLOW, *COMMANDS["bench"][0].split(), cwd=files)
    assert ended.code == 1 and ended.err == "error: out/t.csv: a folder; expected the name of a file.\n"


@pytest.mark.parametrize(
    ("name", "words", "path", "message"),
    [pytest.param(*case, marks=[] if case[1] in EVERYDAY else pytest.mark.slow) for case in INPUTS],
)
def test_inputs_that_cannot_be_read(files, name, words, path, message):
    shutil.rmtree(files / "out", ignore_errors=True)
    words = words.replace("--model tokenizer", "--model model").replace("--model llm", "--model drawer")
    place = files / path
    mode = stat.S_IMODE(place.stat().st_mode)
    place.chmod(0)
    try:
        refused(files, words, message)
    finally:
        place.chmod(mode)


@pytest.mark.parametrize(
    "name", ["shard", pytest.param("encode", marks=pytest.mark.slow), pytest.param("decode", marks=pytest.mark.slow)]
)
def test_a_set_without_permission_is_not_lost(files, name):
    """With --force its files, which are read-only, are replaced; in a folder that is read-only they stay."""
    out, words = files / "out", COMMANDS[name][0]
    shutil.rmtree(out, ignore_errors=True)
    assert run(V2FLOW, *words.split(), cwd=files).code == 0
    before = content(out)
    for path in out.iterdir():
        path.chmod(0o444)
    out.chmod(0o555)
    try:
        refused(files, f"{words} --force", "cannot be written (Permission denied)")
        assert content(out) == before
    finally:
        out.chmod(0o755)
    ended = run(V2FLOW, *words.split(), "--force", cwd=files, obeys=True)
    assert ended.code == 0 and content(out) == before


def test_a_home_and_a_temporary_folder_that_cannot_be_written(files, tmp_path):
    """The caches of libraries lie in the first, what is unpacked in the second."""
    (tmp_path / "home").mkdir(0o555)
    home = {n: str(tmp_path / "home") for n in ("HOME", "HF_HOME", "TORCH_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR")}
    shutil.rmtree(files / "out", ignore_errors=True)
    ended = run(V2FLOW, *COMMANDS["generate"][0].split(), cwd=files, obeys=True, environment=home)
    assert ended.code == 0 and "Traceback" not in ended.err, ended
    assert not list(Path(home["HOME"]).iterdir())
