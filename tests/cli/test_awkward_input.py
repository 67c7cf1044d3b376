"""Awkward input to every command: one sentence with what was found and expected, an exit code, and no traceback."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from v2flow_cli.cli.app import app

from ..conftest import RECIPES

AUTOENCODER = str(RECIPES / "tiny" / "autoencoder.yaml")
RECIPE_FILES = {
    "empty.yaml": b"",
    "list.yaml": b"- 1\n",
    "bytes.yaml": bytes(range(256)),
    "tab.yaml": b"kind:\tautoencoder\n\tx: 1\n",
    "date.yaml": b"kind: autoencoder\noutput: 2001-99-99\n",
    "deep.yaml": b"a: " + b"[" * 20_000,
    "alias.yaml": b"a: *nothing\n",
    "object.yaml": b'!!python/object/apply:os.system ["touch pwned"]\n',
}


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch, tiny_tokenizer_folder):
    """Two pictures in ``img``, their tokens in ``tok``, an empty folder, and files of the wrong kind."""
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        path = Path("img", f"{i}.png")
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (80 * i, 9, 200)).save(path)
    Path("empty").mkdir()
    Path("file").touch()
    Path("tok").mkdir()
    np.save(Path("tok", "a.npy"), np.array([1, 2, 3, 4], np.uint16))
    Path("model").symlink_to(tiny_tokenizer_folder)
    for name, content in RECIPE_FILES.items():
        Path(name).write_bytes(content)


def v2flow(*arguments):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    return done


USAGE = [
    ("decode tok -o out --model model --cfg inf", "--cfg'?: inf is not a finite number"),
    ("decode tok -o out --model model --cfg nan", "--cfg"),
    ("decode tok -o out --model model --noise inf", "--noise'?: inf is not a finite number"),
    ("generate fox --llm-cfg inf", "--llm-cfg'?: inf is not a finite number"),
    ("generate fox --top-p nan", "--top-p"),
    ("shard img -o out --shard-mb inf", "--shard-mb'?: inf is not a finite number"),
    ("shard img -o out --error-budget nan", "--error-budget"),
    ("encode img -o {empty} --model model", "a variable that is not set: -o ''"),
    ("encode {empty} -o out", "a variable that is not set: encode ''"),
    ("encode img -o out --model {empty}", "a variable that is not set: --model ''"),
    ("encode img -o out --batch-size 0", "--batch-size"),
    ("encode img -o out --res 1.5", "--res"),
    ("encode img -o out --verify fully", "'quick', 'full'"),
    ("encode img", "Missing option"),
    ("encode img -o out --modell x", "No such option"),
    ("generate fox --temp inf", "inf: expected different numbers from 0 on"),
    ("generate fox --temp ,", "expected different numbers from 0 on"),
    ("generate fox --seed 1.5", "1.5: expected different numbers"),
    ("train", "Missing argument"),
    ("train a.yaml b.yaml", "unexpected extra argument"),
    ("nothing", "No such command"),
]


@pytest.mark.parametrize(("command", "message"), USAGE)
def test_usage(command, message):
    done = v2flow(*(word.format(empty="") for word in command.split(" ")))
    assert done.exit_code == 2 and done.stdout == ""
    assert re.search(message, done.stderr), done.stderr
    assert not Path("out").exists()


FAILURES = [
    ("train img", "img: the recipe cannot be read"),
    ("train nothing.yaml", "nothing.yaml: no such recipe"),
    ("train empty.yaml", "empty.yaml: found NoneType, expected a mapping"),
    ("train list.yaml", "list.yaml: found list, expected a mapping"),
    ("train bytes.yaml", "bytes.yaml: not valid YAML (unacceptable character"),
    ("train tab.yaml", "tab.yaml: not valid YAML"),
    ("train date.yaml", "date.yaml: not valid YAML (month must be in 1..12"),
    ("train deep.yaml", "deep.yaml: not valid YAML"),
    ("train alias.yaml", "alias.yaml: not valid YAML (found undefined alias"),
    ("train object.yaml", "object.yaml: not valid YAML (could not determine a constructor"),
    (f"train {AUTOENCODER} --set kind=[1]", "kind is [1]; expected one of"),
    (f"train {AUTOENCODER} --set .=1", "--set .=1: expected KEY=VALUE"),
    (f"train {AUTOENCODER} --set data..x=1", "--set data..x=1: expected KEY=VALUE"),
    (f"train {AUTOENCODER} --set output=2001-99-99", "the value is not valid YAML (month must be in 1..12"),
    (f"train {AUTOENCODER} --set output=", "output is None; expected str"),
    (f"train {AUTOENCODER} --set output=''", "output is ''; expected a folder"),
    (f"train {AUTOENCODER} --set model.encoder_width=3", "model.encoder_width is 3; expected an even number"),
    (f"train {AUTOENCODER} --set optimizer.learning_rate=.nan", "learning_rate is nan; expected a number from 0 up"),
    (f"train {AUTOENCODER} --set data.sources=[empty] --dry-run", "empty: no images in it"),
    (f"train {AUTOENCODER} --set data.sources=[img] --set output=file/x --dry-run", "output file/x: cannot be written"),
    ("encode img -o out --model model --device meta", "--device meta: holds no numbers"),
    ("encode img -o out --model model --device xla", "--device xla: not available here"),
    ("encode img -o out --model model --device gpu", "--device gpu: not available here"),
    ("encode img -o out --model model --dtype fp16", "--dtype fp16: expected auto, fp32 or bf16"),
    ("encode img -o out --model model --res 33", "--res 33: an image of 33 x 33 pixels does not fit"),
    ("encode empty -o out --model model", "empty: no images in it"),
    ("encode /dev/zero -o out --model model", "/dev/zero"),
    ("encode [ -o out --model model", "[: no file matches"),
    ("encode img -o file --model model", "file"),
    ("encode img -o out --model img", "img: no model; expected a v2flow tokenizer"),
    ("encode img -o out --model model/config.json", "model/config.json: a file; expected the folder of a model"),
    (
        "generate fox --model model -o out",
        "llm model: a model of type v2flow, for which transformers has no text-only causal LM",
    ),
]


@pytest.mark.parametrize(("command", "message"), FAILURES)
def test_failures(command, message):
    done = v2flow(*command.split(" "))
    assert done.exit_code == 1 and message in done.stderr, done.stderr
    assert not Path("pwned").exists() and not Path("out").exists()


def test_a_file_given_twice_or_by_another_path_is_one_input():
    done = v2flow("decode", "tok", "tok/", "./tok", "tok/a.npy", "-o", "out", "--model", "model")
    assert done.exit_code in (0, 1), done.stderr
    assert len(list(Path("out").rglob("*.png"))) == (1 if done.exit_code == 0 else 0)
