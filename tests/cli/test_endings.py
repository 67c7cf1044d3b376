"""How commands end early: Ctrl-C during imports, pipes whose reader has gone, streams that cannot print a name."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from v2flow_cli.assets import sample_photos

ROOT = Path(__file__).resolve().parents[2]


def start(*arguments, python=(), module="v2flow_cli", **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), **options.pop("env", {})}
    command = [sys.executable, *python, "-m", module, *map(str, arguments)]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | options
    return subprocess.Popen(command, env=environment, preexec_fn=_interruptible, **streams)


def _interruptible():
    """A shell starts what runs in the background with SIGINT ignored, which a child inherits."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process):
    out, err = process.communicate(timeout=300)
    assert b"Traceback" not in (err or b"") and b"Exception ignored" not in (err or b""), err
    return process.returncode, out, err


@pytest.fixture
def tokens(tmp_path, tiny_tokenizer_folder):
    """Two photos, one with a name outside ASCII, and the arguments that encode them."""
    for name, photo in zip(("katzé.png", "dog.png"), (image for _, image in sample_photos())):
        photo.resize((32, 32)).save(tmp_path / name)
    return ["encode", tmp_path, "-o", tmp_path / "tokens", "--model", tiny_tokenizer_folder]


@pytest.mark.parametrize(
    ("module", "arguments", "imported"),
    [
        ("v2flow_cli", ["--help"], b" v2flow_cli.cli.decode\n"),
        ("v2flow_cli.cli.app", ["generate", "--help"], b" typer.core\n"),
        ("v2flow_cli", ["generate", "a red fox"], b" numpy.linalg\n"),
        ("v2flow_cli.cli.app", ["generate", "a red fox"], b" torch.serialization\n"),
        ("v2flow_cli", ["generate", "a red fox"], b" transformers.utils.logging\n"),
    ],
)
def test_ctrl_c_during_imports_is_one_word(tmp_path, module, arguments, imported):
    """-X importtime names every module when it has been imported: there the interrupt arrives, wherever that is."""
    process = start(*arguments, python=("-X", "importtime"), module=module, cwd=tmp_path)
    for line in process.stderr:
        if line.endswith(imported):
            break
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    said = [line for line in err.splitlines() if not line.startswith(b"import time:")]
    assert (code, said) == (130, [b"interrupted"])


@pytest.mark.parametrize("moment", ["v2flow_cli.cli", "v2flow_cli.cli.endings", "v2flow_cli.cli.app", "typer"])
def test_ctrl_c_before_anything_is_imported_is_one_word(moment):
    """As the script ``v2flow`` starts; the interrupt arrives at the moment when the import of that module begins."""
    code = f"""
import signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == {moment!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
from v2flow_cli.__main__ import main
sys.exit(main())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--help"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=_interruptible,
    )
    code, out, err = finish(process)
    assert (code, out, err) == (130, b"", b"interrupted\n")


def test_sigterm_in_the_middle_leaves_no_temporary_file(tokens, tmp_path):
    process = start(*tokens, python=("-X", "importtime"))
    for line in process.stderr:
        if b"v2flow_cli.jobs.encode" in line:
            break
    process.send_signal(signal.SIGTERM)
    code, _, _ = finish(process)
    assert code == 130 and not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("arguments", [["encode", "--help"], ["--version"]])
def test_a_reader_who_has_gone_ends_the_help_quietly(arguments):
    process = start(*arguments)
    process.stdout.close()
    process.stdout = None
    code, _, err = finish(process)
    assert code in (1, 141) and err == b""


def test_a_reader_of_stdout_who_has_gone_is_the_exit_code_of_sigpipe(tokens, tmp_path):
    process = start(*tokens)
    process.stdout.close()
    process.stdout = None
    code, _, err = finish(process)
    assert code == 141 and b"error" not in err
    assert len(list((tmp_path / "tokens").glob("*.npy"))) == 2


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_of_stderr_who_has_gone_does_not_stop_the_work(tokens, unbuffered):
    process = start(*tokens, env={"PYTHONUNBUFFERED": unbuffered})
    process.stderr.close()
    process.stderr = None
    code, out, _ = finish(process)
    assert code == 0 and b"2 images" in out


def test_a_full_disk_under_stdout_is_one_sentence(tokens):
    with open("/dev/full", "wb") as full:
        code, _, err = finish(start(*tokens, stdout=full))
    assert code == 1 and b"error: stdout: the result cannot be written (No space left on device)." in err


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_streams(tokens, tmp_path, closed):
    command = " ".join(f"'{part}'" for part in [sys.executable, "-m", "v2flow_cli", *tokens])
    done = subprocess.run(f"{command} {closed}", shell=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and len(list((tmp_path / "tokens").glob("*.npy"))) == 2


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}])
def test_a_stdout_that_cannot_print_a_name(tokens, tmp_path, env):
    env |= {"PYTHONCOERCECLOCALE": "0"}
    assert finish(start(*tokens, env=env))[0] == 0
    decode = ["decode", tmp_path / "tokens", "-o", tmp_path / "katzé", "--model", tokens[-1]]
    code, out, _ = finish(start(*decode, "--json", env=env))
    assert code == 0 and {Path(name).parent.name for name in json.loads(out)["images"]} == {"katzé"}
    code, out, err = finish(start(*decode, env=env))  # refused: they exist
    assert code == 1 and b"katz" in err and not out
