"""``v2flow decode`` through Typer's runner, on a tiny random tokenizer of 4 tokens of 64 codes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from v2flow_cli.cli.app import app
from v2flow_cli.jobs.decode import image_seed
from v2flow_cli.store.token_file import save_samples, save_token_ids
from v2flow_cli.store.token_manifest import TokenManifest
from v2flow_cli.tokenizer import V2FlowTokenizer


@pytest.fixture(scope="module")
def model(tiny_tokenizer_folder, tmp_path_factory):
    """The tiny tokenizer with a velocity network that answers: a fresh one ignores its input."""
    tokenizer = V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in (tokenizer.flow, tokenizer.context):
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(model):
    def invoke(*args):
        options = ["--model", str(model), "--device", "cpu", "--dtype", "fp32"]
        return CliRunner().invoke(app, ["decode", *map(str, args), *options])

    return invoke


@pytest.fixture
def tokens(tmp_path, model):
    """A token folder of three images, one of them in a subfolder."""
    digest = V2FlowTokenizer.from_pretrained(model).token_digest
    folder = tmp_path / "tokens"
    for i, name in enumerate(("a", "b", "sub/c")):
        save_token_ids(folder / f"{name}.npy", np.arange(4) * 7 + i, 64)
    TokenManifest(digest, (32, 32), 64, 4, {"a": 1, "b": 1, "sub/c": 1}).save(folder)
    return folder


def pictures(folder):
    return {
        p.relative_to(folder).as_posix(): np.asarray(Image.open(p)).astype(int) for p in sorted(folder.rglob("*.png"))
    }


def equal(a, b):
    assert a.keys() == b.keys()
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_the_folder_tree_is_written_as_png(run, tokens, tmp_path):
    done = run(tokens, "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    figures = json.loads(done.stdout)
    assert len(figures["images"]) == 3 and figures["failed"] == []
    images = pictures(tmp_path / "out")
    assert list(images) == ["a.png", "b.png", "sub/c.png"]
    assert {image.shape for image in images.values()} == {(32, 32, 3)}


def test_pictures_equal_those_of_the_tokenizer(run, tokens, tmp_path, model):
    assert run(tokens / "a.npy", "-o", tmp_path / "out", "--cfg", 2.5, "--seed", 3).exit_code == 0
    tokenizer = V2FlowTokenizer.from_pretrained(model)
    ids = torch.tensor([[0, 7, 14, 21]])
    image = tokenizer.decode(ids, guidance_scale=2.5, seeds=[image_seed(3, "a")])
    (expected,) = tokenizer.image_processor.to_pil(image)
    assert np.array_equal(pictures(tmp_path / "out")["a.png"], np.asarray(expected).astype(int))


def test_an_image_does_not_depend_on_its_batch(run, tokens, tmp_path):
    run(tokens, "-o", tmp_path / "all", "--batch-size", 3)
    run(tokens, "-o", tmp_path / "single", "--batch-size", 1)
    together, alone = pictures(tmp_path / "all"), pictures(tmp_path / "single")
    assert all(abs(together[n] - alone[n]).max() <= 1 for n in alone)  # a level, where rounding tips over


@pytest.mark.parametrize(
    "option",
    ["--cfg=3", "--rounds=3", "--steps=5", "--solver=heun", "--noise=0", "--seed=1", "--solver=dpm++"],
)
def test_every_option_changes_the_result(run, tokens, tmp_path, option):
    steps = [] if "steps" in option else ["--steps", 3]
    for out, extra in (("plain", []), ("again", []), ("changed", [option])):
        done = run(tokens, "-o", tmp_path / out, *steps, *extra)
        assert done.exit_code == 0, done.stderr
    plain = pictures(tmp_path / "plain")
    assert equal(plain, pictures(tmp_path / "again"))
    assert not equal(plain, pictures(tmp_path / "changed"))


def test_the_guidance_schedule_changes_the_result(run, tokens, tmp_path):
    for schedule in ("constant", "linear"):
        done = run(tokens, "-o", tmp_path / schedule, "--cfg", 4, "--schedule", schedule, "--rounds", 3)
        assert done.exit_code == 0, done.stderr
    assert not equal(pictures(tmp_path / "constant"), pictures(tmp_path / "linear"))


def test_shard_files_give_a_png_a_key_inside_the_output(run, tokens, tmp_path):
    ids = np.stack([np.load(tokens / "a.npy")] * 3)
    save_token_ids(tmp_path / "s.npy", ids, 64)
    save_samples(tmp_path / "s.npy", [("cats/a", ()), ("../../up", ()), ("CATS/A", ())])
    done = run(tmp_path / "s.npy", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert sorted(pictures(tmp_path / "out")) == ["s/CATS/A-2.png", "s/cats/a.png", "s/up.png"]


def test_rows_without_keys_are_numbered_and_a_missing_manifest_is_logged(run, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 4), np.int64))
    done = run(tmp_path / "x.npy", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "1 token files without manifest" in done.stderr
    assert list(pictures(tmp_path / "out")) == ["x/000000.png", "x/000001.png"]


def test_a_missing_npy_beside_a_token_folder_means_the_folder(run, tokens, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("tokens.npy", "--cfg", "3.0")
    assert done.exit_code == 0, done.stderr
    assert "tokens.npy does not exist; decoding the token folder tokens/ instead" in done.stderr
    assert len(pictures(tmp_path / "decoded")) == 3


def test_existing_images_need_force(run, tokens, tmp_path):
    assert run(tokens, "-o", tmp_path / "out").exit_code == 0
    again = run(tokens, "-o", tmp_path / "out")
    assert again.exit_code == 1 and "a.png: exists already (and 2 more)" in again.stderr
    assert run(tokens, "-o", tmp_path / "out", "--force").exit_code == 0


def test_tokens_of_another_tokenizer_are_refused(run, tokens, tmp_path):
    TokenManifest("f" * 16, (32, 32), 64, 4, {"a": 1}).save(tokens)
    done = run(tokens / "a.npy", "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "a.npy: encoded by tokenizer ffffffffffffffff, but this tokenizer is" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(4, np.float32), "dtype is float32"),
        (np.array([None] * 4), "not a complete .npy"),
        (np.full(4, 64), "holds the id 64"),
        (np.zeros(5, np.uint16), "5 tokens an image do not fit this model"),
        (np.zeros((1, 1, 4), np.uint16), "shape is (1, 1, 4)"),
    ],
)
def test_bad_files_are_listed_and_good_ones_decoded(run, tokens, tmp_path, array, message):
    np.save(tokens / "bad.npy", array, allow_pickle=True)
    done = run(tokens, "-o", tmp_path / "out", "--json")
    assert done.exit_code == 1
    (failed,) = json.loads(done.stdout)["failed"]
    assert failed["source"].endswith("bad.npy") and message in failed["reason"]
    assert message in done.stderr and "Traceback" not in done.output
    assert len(pictures(tmp_path / "out")) == 3


def test_a_length_that_differs_from_the_manifest(run, tokens, tmp_path):
    save_token_ids(tokens / "a.npy", np.zeros(16, int), 64)
    done = run(tokens / "a.npy", "-o", tmp_path / "out")
    assert done.exit_code == 1 and "16 tokens an image; expected 4" in done.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["none.npy"], 1, "no such file or folder"),
        (["."], 1, "no token files in it"),
        (["tokens", "--solver", "rk45"], 2, "--solver"),
        (["tokens", "--schedule", "cosine"], 2, "--schedule"),
        (["tokens", "--rounds", "0"], 2, "--rounds"),
        (["tokens", "--cfg", "-1"], 2, "--cfg"),
    ],
)
def test_bad_arguments(run, tmp_path, monkeypatch, tokens, args, code, message):
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty if args[0] == "." else tmp_path)
    done = run(*args)
    assert done.exit_code == code
    assert message in done.stderr
