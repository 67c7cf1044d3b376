"""The full pipeline on tiny recipes by the commands: train, encode, shard, finetune-llm, generate, decode, bench."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from v2flow_cli.cli.app import app

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "tiny"


def v2flow(*arguments):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, f"{arguments}: {done.stderr}\n{done.exception!r}"
    return done.stdout


@pytest.fixture
def photos(tmp_path, sample_images) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, image in enumerate(sample_images):
        image.resize((96, 80)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"photo number {i}\nthe same photo, number {i}\n")
    return folder


def test_the_full_pipeline(tmp_path, photos, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over a photo of a lazy dog number one\n" * 60)
    v2flow("shard", photos, "-o", "shards")

    data = ["--set", "data.sources=[shards]"]
    v2flow("train", RECIPES / "autoencoder.yaml", *data, "--set", "train.steps=2")
    v2flow("finetune-llm", RECIPES / "lm.yaml", "--set", "text=[text.txt]")
    plan = json.loads(v2flow("train", RECIPES / "tokenizer.yaml", *data, "--dry-run", "--json"))
    assert plan["tokens_per_image"] == 16 and "missing" not in plan
    trained = json.loads(v2flow("train", RECIPES / "tokenizer.yaml", *data, "--set", "train.steps=3", "--json"))
    assert trained["steps"] == 3
    tokenizer = Path(trained["folder"])

    v2flow("encode", photos, "-o", "tokens", "--model", tokenizer)
    ids = np.load(tmp_path / "tokens" / "0.npy", allow_pickle=False)
    assert ids.shape == (16,) and ids.dtype == np.uint16
    v2flow("decode", "tokens.npy", "--cfg", "3.0", "--model", tokenizer)
    assert Image.open(tmp_path / "decoded" / "0.png").size == (64, 64)

    v2flow("encode", "shards", "-o", "runs/tiny/tokens", "--model", tokenizer)
    llm = ["--set", "tokenizer=" + str(tokenizer), "--set", "data.token_sets=[runs/tiny/tokens]"]
    v2flow("finetune-llm", RECIPES / "llm.yaml", *llm)
    v2flow("generate", "a red fox", "--model", "runs/tiny/llm", "--tokenizer", tokenizer, "--temp", "0.9")
    (drawn,) = (tmp_path / "generated").glob("*.png")
    assert Image.open(drawn).size == (64, 64)

    measured = json.loads(v2flow("bench", photos, "--res", "64", "--model", tokenizer, "--json", "--no-speed"))
    assert "psnr" in json.dumps(measured).lower()
