"""``v2flow encode`` through Typer's runner, on a tiny random tokenizer of 4 tokens of 64 codes."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from v2flow_cli.cli.app import app
from v2flow_cli.store.token_file import read_token_set
from v2flow_cli.store.token_manifest import TokenManifest
from v2flow_cli.store.token_sets import token_samples
from v2flow_cli.tokenizer import V2FlowTokenizer


@pytest.fixture
def run(tiny_tokenizer_folder):
    def invoke(*args, model=tiny_tokenizer_folder):
        return CliRunner().invoke(app, ["encode", *map(str, args), "--model", str(model), "--device", "cpu"])

    return invoke


@pytest.fixture
def folder(tmp_path, sample_images):
    for i, image in enumerate(sample_images):
        path = tmp_path / "imgs" / ("even" if i % 2 == 0 else "odd") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return tmp_path / "imgs"


@pytest.fixture
def tars(folder, tmp_path):
    (folder / "odd" / "1.txt").write_text("one\ntwo\n")
    done = CliRunner().invoke(app, ["shard", str(folder), "-o", str(tmp_path / "tars"), "--shard-mb", "0.01"])
    assert done.exit_code == 0, done.stderr
    assert len(list((tmp_path / "tars").glob("*.tar"))) > 1
    return tmp_path / "tars"


def test_a_folder_tree_is_kept(run, folder, tmp_path, tiny_tokenizer_folder):
    done = run(folder, "-o", tmp_path / "tokens", "--json")
    assert done.exit_code == 0, done.stderr
    figures = json.loads(done.stdout)
    assert (figures["images"], figures["files"], figures["failed"]) == (5, 5, [])
    assert (figures["tokens_per_image"], figures["codebook_size"]) == (4, 64)
    manifest = TokenManifest.load(tmp_path / "tokens")
    assert list(manifest.files) == ["even/0", "even/2", "even/4", "odd/1", "odd/3"]
    tokenizer = V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder)
    assert manifest.tokenizer_digest == tokenizer.token_digest
    pixels = tokenizer.image_processor.preprocess_one(Image.open(folder / "odd" / "1.png"), 32)
    ids = np.load(tmp_path / "tokens" / "odd" / "1.npy")
    assert ids.dtype == np.uint16 and ids.tolist() == tokenizer.encode(pixels[None])[0].tolist()


def test_ids_do_not_depend_on_batch_size_or_workers(run, folder, tmp_path):
    for out, *options in (("a", "--batch-size", 1), ("b", "--batch-size", 4, "--workers", 3)):
        assert run(folder, "-o", tmp_path / out, *options).exit_code == 0
    for name in TokenManifest.load(tmp_path / "a").files:
        assert (tmp_path / "a" / f"{name}.npy").read_bytes() == (tmp_path / "b" / f"{name}.npy").read_bytes()


def test_parquet_lies_beside_the_token_files(run, tars, tmp_path):
    done = run(tars, "-o", tmp_path / "tokens", "--parquet", "--json")
    assert done.exit_code == 0, done.stderr
    path = tmp_path / "tokens" / "tokens-00000.parquet"
    assert json.loads(done.stdout)["parquet"] == [str(path)]
    expected = {s.key: (s.captions, s.token_ids.tolist()) for s in read_token_set(tmp_path / "tokens")}
    found = {s.key: (s.captions, s.token_ids.tolist()) for s in token_samples(path)}
    assert found == expected and found["odd/1"][0] == ("one", "two")
    again = run(tars, "-o", tmp_path / "tokens", "--parquet")  # all shards are kept, the table is written anew
    assert again.exit_code == 0 and str(path) in again.stdout


def test_parquet_without_pyarrow_fails_before_anything_is_encoded(run, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    done = run(folder, "-o", tmp_path / "tokens", "--parquet")
    assert done.exit_code == 1 and "pip install 'v2flow[parquet]'" in done.stderr
    assert not (tmp_path / "tokens").exists()


def test_files_globs_and_other_sizes(run, folder, tmp_path):
    done = run(f"{folder}/*/[0-2].png", folder / "odd" / "3.png", "-o", tmp_path / "tokens", "--res", 64)
    assert done.exit_code == 0, done.stderr
    manifest = TokenManifest.load(tmp_path / "tokens")
    assert sorted(manifest.files) == ["3", "even/0", "even/2", "odd/1"]
    assert manifest.image_size == (64, 64)
    assert np.load(tmp_path / "tokens" / "3.npy").shape == (16,) == (manifest.tokens_per_image,)


def test_tars_give_one_file_a_shard_with_keys_and_captions(run, folder, tars, tmp_path):
    assert run(folder, "-o", tmp_path / "loose").exit_code == 0
    done = run(tars, "-o", tmp_path / "tokens")
    assert done.exit_code == 0, done.stderr
    assert "5 images" in done.stdout
    samples = {s.key: s for s in read_token_set(tmp_path / "tokens")}
    assert samples["odd/1"].captions == ("one", "two")
    loose = {s.key: s.token_ids.tolist() for s in read_token_set(tmp_path / "loose")}
    assert {key: s.token_ids.tolist() for key, s in samples.items()} == loose


def test_finished_shards_are_kept_and_missing_ones_encoded(run, tars, tmp_path):
    out = tmp_path / "tokens"
    assert run(tars, "-o", out).exit_code == 0
    first, second, *_ = sorted(out.glob("*.npy"))
    stamp, content = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()  # as if the run had been stopped
    done = run(tars, "-o", out, "--json")
    assert done.exit_code == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["files"] == 1 and figures["kept_files"] == len(list(tars.glob("*.tar"))) - 1
    assert first.stat().st_mtime_ns == stamp and second.read_bytes() == content


def test_a_damaged_shard_among_intact_ones(run, tars, tmp_path):
    first, second, *_ = sorted(tars.glob("*.tar"))
    first.write_bytes(first.read_bytes()[:3000])
    done = run(tars, "-o", tmp_path / "tokens", "--json")
    assert done.exit_code == 1
    (failed,) = json.loads(done.stdout)["failed"]
    assert failed["source"] == str(first)
    assert "Traceback" not in done.output
    assert (tmp_path / "tokens" / f"{second.stem}.npy").exists()
    assert not (tmp_path / "tokens" / f"{first.stem}.npy").exists()


def test_bad_images_are_listed_and_the_good_ones_kept(run, folder, tmp_path):
    (folder / "text.jpg").write_text("text")
    (folder / "zero.png").touch()
    (folder / "cut.png").write_bytes((folder / "odd" / "1.png").read_bytes()[:3000])
    done = run(folder, "-o", tmp_path / "tokens", "--json")
    assert done.exit_code == 1
    failed = {f["source"].rsplit("/", 1)[-1]: f["reason"] for f in json.loads(done.stdout)["failed"]}
    assert failed.keys() == {"text.jpg", "zero.png", "cut.png"}
    assert "empty" in failed["zero.png"] and "not an image" in failed["text.jpg"] and "damaged" in failed["cut.png"]
    assert "text.jpg" in done.stderr and "Traceback" not in done.output
    assert TokenManifest.load(tmp_path / "tokens").count == 5


def test_bad_images_in_a_tar_are_listed_on_every_run(run, folder, tmp_path):
    from tests.store.test_shards import write_tar

    good = (folder / "odd" / "1.png").read_bytes()
    path = write_tar(tmp_path / "t.tar", [("a.png", good), ("b.png", b"bad"), ("c.png", good)])
    for _ in range(2):
        done = run(path, "-o", tmp_path / "tokens", "--json")
        assert done.exit_code == 1
        assert [(f["source"], f["key"]) for f in json.loads(done.stdout)["failed"]] == [(str(path), "b")]
    assert [s.key for s in read_token_set(tmp_path / "tokens")] == ["a", "c"]


def test_existing_outputs_need_force(run, folder, tmp_path):
    assert run(folder, "-o", tmp_path / "tokens").exit_code == 0
    again = run(folder, "-o", tmp_path / "tokens")
    assert again.exit_code == 1
    assert "0.npy: exists already (and 4 more). Use --force" in again.stderr
    assert run(folder, "-o", tmp_path / "tokens", "--force").exit_code == 0


def test_tokens_of_another_kind_are_not_mixed(run, folder, tmp_path):
    assert run(folder / "odd", "-o", tmp_path / "tokens").exit_code == 0
    assert run(folder / "even", "-o", tmp_path / "tokens").exit_code == 0
    assert sorted(TokenManifest.load(tmp_path / "tokens").files) == ["0", "1", "2", "3", "4"]
    Image.new("RGB", (9, 9)).save(tmp_path / "new.png")
    done = run(tmp_path / "new.png", "-o", tmp_path / "tokens", "--res", 64)
    assert done.exit_code == 1
    assert "holds tokens of tokenizer" in done.stderr and "at 64 px" in done.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["none"], 1, "no such file or folder"),
        (["empty"], 1, "no images in it"),
        (["imgs", "--res", "33"], 1, "--res 33"),
        (["imgs", "--dtype", "fp64"], 1, "--dtype fp64"),
        (["imgs", "--batch-size", "0"], 2, "--batch-size"),
    ],
)
def test_bad_arguments(run, folder, tmp_path, args, code, message):
    (tmp_path / "empty").mkdir()
    done = run(tmp_path / args[0], "-o", tmp_path / "tokens", *args[1:])
    assert done.exit_code == code
    assert message in done.stderr


def test_a_folder_that_is_no_model_and_an_output_that_is_a_file(run, folder, tmp_path):
    done = run(folder, "-o", tmp_path / "tokens", model=folder)
    assert done.exit_code == 1 and "v2flow tokenizer" in done.stderr
    (tmp_path / "tokens").write_text("a file")
    done = run(folder, "-o", tmp_path / "tokens")
    assert done.exit_code == 1 and "a file; expected a folder" in done.stderr


def test_images_and_tars_are_not_mixed(run, folder, tars, tmp_path):
    done = run(folder, tars, "-o", tmp_path / "tokens")
    assert done.exit_code == 1 and "both images and tars" in done.stderr
