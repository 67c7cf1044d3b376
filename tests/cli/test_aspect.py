"""``encode --aspect keep`` and what reads its tokens: every image has a size of its own, and gets it back."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from v2flow_cli.cli.app import app
from v2flow_cli.errors import TokenFileError
from v2flow_cli.store.token_file import load_sizes, read_sized_token_set, read_token_set, samples_path
from v2flow_cli.store.token_manifest import TokenManifest
from v2flow_cli.store.token_parquet import parquet_files, read_parquet
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.preprocess import image_to_tensor, to_uint8

KEEP = ("--aspect", "keep", "--res", "64")  # four tokens a side
RAW = {"long": (50, 400), "square": (90, 90), "tall": (120, 70), "wide": (70, 120)}


@pytest.fixture
def run(tiny_tokenizer_folder):
    def invoke(command, *args):
        return CliRunner().invoke(
            app, [command, *map(str, args), "--model", str(tiny_tokenizer_folder), "--device", "cpu", "--dtype", "fp32"]
        )

    return invoke


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, (height, width) in RAW.items():
        small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((width, height)).save(folder / f"{name}.png")
    (folder / "wide.txt").write_text("a wide one\n")
    return folder


def expected(tokenizer, photos, name):
    image = Image.open(photos / f"{name}.png")
    pixels = image_to_tensor(image, tokenizer.fitted_size(*image.size, 64))
    ids = tokenizer.encode(pixels[None])
    return tuple(pixels.shape[1:]), ids


def test_every_image_has_its_size_from_file_to_png(run, photos, tmp_path, tiny_tokenizer_folder):
    done = run("encode", photos, "-o", tmp_path / "t", *KEEP, "--batch-size", 3, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["aspect"], report["image_size_px"], report["variable_length"]) == ("keep", [64, 64], True)
    manifest = TokenManifest.load(tmp_path / "t")
    assert manifest.keep_aspect and json.loads((tmp_path / "t/manifest.json").read_text())["format_version"] == 3
    tokenizer = V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder)
    found = {sample.key: (size, sample) for sample, size in read_sized_token_set(tmp_path / "t")}
    for name in RAW:
        size, ids = expected(tokenizer, photos, name)
        assert found[name][0] == size and found[name][1].token_ids.tolist() == ids[0].tolist(), name
        assert abs(size[1] / size[0] / min(4.0, RAW[name][1] / RAW[name][0]) - 1) < 0.3
        assert len(ids[0]) == tokenizer.num_tokens(*size) <= manifest.tokens_per_image
    assert len({size for size, _ in found.values()}) == 4 and found["wide"][1].captions == ("a wide one",)
    done = run("decode", tmp_path / "t", "-o", tmp_path / "d", "--batch-size", 2)
    assert done.exit_code == 0, done.stderr
    for name, (size, _) in found.items():
        assert Image.open(tmp_path / "d" / f"{name}.png").size == (size[1], size[0])


def test_tars_and_parquet_store_the_sizes(run, photos, tmp_path):
    assert CliRunner().invoke(app, ["shard", str(photos), "-o", str(tmp_path / "tars")]).exit_code == 0
    assert run("encode", photos, "-o", tmp_path / "loose", *KEEP).exit_code == 0
    done = run("encode", tmp_path / "tars", "-o", tmp_path / "t", *KEEP, "--parquet")
    assert done.exit_code == 0, done.stderr
    loose, packed = (
        {sample.key: (size, sample.token_ids.tolist()) for sample, size in read_sized_token_set(tmp_path / name)}
        for name in ("loose", "t")
    )
    assert loose == packed
    import pyarrow.parquet

    (path,) = parquet_files(tmp_path / "t")
    rows = pyarrow.parquet.read_table(path).to_pylist()
    assert {row["key"]: ((row["height"], row["width"]), row["tokens"]) for row in rows} == packed
    assert {sample.key: sample.token_ids.tolist() for sample in read_parquet([path])} == {
        key: ids for key, (_, ids) in packed.items()
    }
    done = run("decode", tmp_path / "t", "-o", tmp_path / "d")
    assert done.exit_code == 0, done.stderr
    sizes = {path.stem: Image.open(path).size for path in (tmp_path / "d").rglob("*.png")}
    assert sizes == {key: (width, height) for key, ((height, width), _) in packed.items()}


def test_a_decoded_row_does_not_depend_on_its_batch(run, photos, tmp_path):
    assert run("encode", photos, "-o", tmp_path / "t", *KEEP).exit_code == 0
    for name, more in (("all", ()), ("one", ("--batch-size", 1))):
        assert run("decode", tmp_path / "t", "-o", tmp_path / name, *more).exit_code == 0
    for path in (tmp_path / "all").iterdir():
        one, other = (np.asarray(Image.open(tmp_path / folder / path.name)) for folder in ("all", "one"))
        assert np.array_equal(one, other)


def test_squares_stay_the_default_and_are_not_mixed_with_shapes(run, photos, tmp_path):
    assert run("encode", photos, "-o", tmp_path / "t").exit_code == 0
    assert json.loads((tmp_path / "t/manifest.json").read_text())["format_version"] == 1
    done = run("encode", photos, "-o", tmp_path / "t", "--aspect", "keep")
    assert done.exit_code == 1 and "at 32 px, in their own shapes" in done.stderr and "--force" in done.stderr
    done = run("encode", photos, "-o", tmp_path / "u", *KEEP, "--tokens", 4)
    assert done.exit_code == 1 and "--aspect keep and --tokens 4: the shape of an image determines" in done.stderr


def test_a_language_model_refuses_shapes(run, photos, tmp_path):
    from v2flow_cli.store.token_sets import token_set_manifest

    assert run("encode", photos, "-o", tmp_path / "t", *KEEP).exit_code == 0
    with pytest.raises(TokenFileError, match=r"t: its images keep their shapes .* Encode them with --aspect square"):
        token_set_manifest(tmp_path / "t").check_square(tmp_path / "t")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"key": "wide", "captions": []}', r"size is None; expected \[height, width\]"),
        ('{"key": "wide", "captions": [], "size": [0, 3]}', r"size is \[0, 3\]"),
        ("", "missing or empty, but it holds the images' sizes"),
    ],
)
def test_a_missing_size_is_an_error(run, photos, tmp_path, line, message):
    assert run("encode", photos, "-o", tmp_path / "t", *KEEP).exit_code == 0
    samples_path(tmp_path / "t" / "wide.npy").write_text(f"{line}\n" if line else "")
    with pytest.raises(TokenFileError, match=message):
        load_sizes(tmp_path / "t" / "wide.npy")
    with pytest.raises(TokenFileError):
        list(read_token_set(tmp_path / "t"))
    done = run("decode", tmp_path / "t", "-o", tmp_path / "d")
    assert done.exit_code == 1 and "wide.npy" in done.stderr and "Traceback" not in done.stderr
    assert len(list((tmp_path / "d").glob("*.png"))) == 3  # the others are decoded


def test_a_size_that_does_not_fit_the_ids_is_left_out(run, photos, tmp_path):
    assert run("encode", photos, "-o", tmp_path / "t", *KEEP).exit_code == 0
    samples_path(tmp_path / "t" / "wide.npy").write_text('{"key": "wide", "captions": [], "size": [32, 32]}\n')
    done = run("decode", tmp_path / "t", "-o", tmp_path / "d")
    assert done.exit_code == 1 and "do not fit this model" in done.stderr


def test_the_processor_takes_the_fitted_size(photos, tiny_tokenizer):
    image = Image.open(photos / "wide.png")
    size = tiny_tokenizer.fitted_size(*image.size)
    pixels = tiny_tokenizer.image_processor(image, size=size).pixel_values
    assert torch.equal(pixels[0], image_to_tensor(image, size)) and tuple(pixels.shape[2:]) == size
    decoded = tiny_tokenizer.decode(tiny_tokenizer.encode(pixels), height=size[0], width=size[1], seeds=[0])
    assert to_uint8(decoded).shape == (1, *size, 3)
