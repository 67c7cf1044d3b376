"""What the field cases share: pictures of random pixels, and commands through Typer's runner."""

from __future__ import annotations

import random

import pytest
from PIL import Image
from typer.testing import CliRunner

from v2flow_cli.cli.app import app


@pytest.fixture
def picture():
    """``picture(path, seed, side)`` writes a picture of random pixels and returns its path."""

    def write(path, seed=0, side=16, **options):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.Random(seed).randbytes(3 * side * side)
        Image.frombytes("RGB", (side, side), pixels).save(path, **options)
        return path

    return write


@pytest.fixture
def v2flow(tiny_tokenizer_folder):
    """``v2flow("encode", folder, "-o", out)`` as on the command line, with the tiny tokenizer where one is used."""

    def run(command, *args, model=tiny_tokenizer_folder):
        options = ["--model", str(model)] if command in ("encode", "decode", "bench") and model else []
        done = CliRunner().invoke(app, [command, *map(str, args), *options])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done

    return run
