"""12. Whatever a command replaces is the old or the new one, or readers refuse it: killed at every file operation.

Sets of shards, and tokens of tars, are in test_11. Each case here is a command over an output that exists. It is killed
at every operation that changes a file; files that it writes are then empty, or end in half a line. Commands that load
a model are killed at every few operations every day, and at more of them among the slow tests.
"""

import dataclasses
import importlib.util
import io
import json
import random
import re
import shutil
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from tests.conftest import RECIPES, build_tiny_tokenizer
from tests.llm.conftest import llm_folder, recipe, text_tokenizer, token_set  # noqa: F401  (fixtures)
from tests.reliability.processes import content, kills
from tests.test_demo_page import llm_folder as drawing_llm  # noqa: F401  (a fixture)
from tests.training.conftest import quiet, world  # noqa: F401  (a fixture)
from tests.training.conftest import recipe as training_recipe
from v2flow_cli.assets import sample_photos
from v2flow_cli.bench.results import as_record, tables
from v2flow_cli.bench.run import run_bench
from v2flow_cli.cli.app import app
from v2flow_cli.demo.page import demo
from v2flow_cli.errors import V2FlowError
from v2flow_cli.jobs.add_decoder import add_decoder
from v2flow_cli.jobs.encode import SetEncoder, encode_files
from v2flow_cli.llm.load import load_llm
from v2flow_cli.runtime.publishing import WEIGHTS, publishing
from v2flow_cli.store import token_parquet
from v2flow_cli.store.find import find_images, find_tars
from v2flow_cli.store.token_file import check_finished, load_samples, load_token_ids, read_token_set
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.autoencoder import V2FlowAutoencoder
from v2flow_cli.training.budget_stage import StageRun
from v2flow_cli.training.loop import train
from v2flow_cli.training.objectives.drawing import finetune


def killed_at_every(everyday, slow):
    """Parametrize ``every``: the command is killed at every so many operations."""
    return pytest.mark.parametrize("every", [everyday, pytest.param(slow, marks=pytest.mark.slow)])


def check(out, command, read, *, every=1, again=None, after=None, ignored=r"(.*/)?\..*"):
    """``command`` over ``out``, killed at every file operation.

    What ``read`` gives then is what it gave before or what it gives after the command, unless it raises; no visible
    file is half of one; and ``again`` (default: ``command``) ends with the bytes of a run that was not killed.
    Args:   after, the folder that an uninterrupted run leaves (default: ``command`` makes it); ignored, a pattern of
            files that differ from run to run.
    """
    before, old = content(out), read(out)
    if after is None:
        saved = shutil.copytree(out, out.with_name("saved"))
        command()
        after = shutil.copytree(out, out.with_name("after"))
        shutil.rmtree(out)
        saved.rename(out)
    new, final = read(after), {k: v for k, v in content(after).items() if not re.fullmatch(ignored, k)}
    assert old != new
    states = set()
    for _ in kills(out, command, every):
        for name, data in content(out).items():
            if not re.fullmatch(ignored, name):
                assert data in (before.get(name), final.get(name)), f"{name}: {len(data)} bytes, neither old nor new"
        try:
            found = read(out)
            assert found in (old, new)
            states.add("old" if found == old else "new")
        except V2FlowError as error:
            assert re.search("interrupted|was stopped|SHA-256|manifest|no model", str(error)), error
            states.add("refused")
        (again or command)()
        assert {k: v for k, v in content(out).items() if not re.fullmatch(ignored, k)} == final
        assert not list(out.rglob(".*")), "what the killed process left"
    return states


def cli(*arguments):
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two folders with pictures of the same names; in the first one they have captions, in the second one some."""
    folders = []
    for name, captioned in (("old", 4), ("new", 1)):
        folder, rng = tmp_path_factory.mktemp(name), random.Random(name)
        for i in range(4):
            Image.frombytes("RGB", (32, 32), rng.randbytes(3072)).save(folder / f"{i}.png")
            if i < captioned:
                (folder / f"{i}.txt").write_text(f"{name} caption {i}\n")
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def encode(tiny_tokenizer_folder):
    encoder = SetEncoder(V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder), workers=1, batch_size=2)

    def run(folder, out, force=False):
        encode_files(encoder, find_images([folder]), out, force=force, tick=lambda n: None)

    return run


def token_rows(out):
    """Key, captions and ids of each image that a reader takes, listed or not; nothing of a folder that is not there."""
    rows = {s.key: (s.captions, s.token_ids.tolist()) for s in read_token_set(out)} if out.is_dir() else {}
    for path in out.glob("*.npy"):
        try:
            check_finished(path)
        except V2FlowError:
            continue
        (sample,) = load_samples(path) or [(path.stem, ())]
        rows[path.stem] = (sample[1], load_token_ids(path, 64).tolist())
    return rows


@pytest.mark.parametrize("force", [True, False])
def test_tokens_of_loose_images(photos, encode, tmp_path, force):
    """With --force over others, and from nothing, where the repeated run resumes."""
    old, new = photos
    out = tmp_path / "out"
    encode(old, tmp_path / "old")
    encode(new, tmp_path / "new")
    of = {name: token_rows(tmp_path / name) for name in ("old", "new")}
    shutil.copytree(tmp_path / "old", out) if force else out.mkdir()
    killed = 0
    for _ in kills(out, partial(encode, new, out, force)):
        killed += 1
        for key, row in (token_rows(out) if list(out.glob("manifest.json")) else {}).items():
            assert row in (of["old"][key], of["new"][key])
        try:
            encode(new, out)
        except V2FlowError as error:
            assert (force and "exists already" in str(error)) or "--force" in str(error)
            encode(new, out, force=True)
        assert content(out) == content(tmp_path / "new")
    assert killed > 8


def parquet_rows(out):
    return [
        (s.key, s.captions, s.token_ids.tolist()) for s in token_parquet.read_parquet(token_parquet.parquet_files(out))
    ]


@pytest.mark.parametrize("counts", [(4, 2), (2, 4)])
def test_parquet_files_of_a_set(photos, encode, tmp_path, monkeypatch, counts):
    monkeypatch.setattr(token_parquet, "ROWS_PER_FILE", 1)
    monkeypatch.setattr(token_parquet, "ROWS_PER_GROUP", 1)
    old, new = (shutil.copytree(folder, tmp_path / f"{folder.name}-few") for folder in photos)
    for folder, count in zip((old, new), counts):
        for i in range(count, 4):
            (folder / f"{i}.png").unlink()
    out = tmp_path / "out"
    encode(old, out)
    token_parquet.write_parquet(out)
    tables = {path.name: path.read_bytes() for path in out.glob("*.parquet")}
    shutil.rmtree(out)
    encode(new, out)
    for name, data in tables.items():
        (out / name).write_bytes(data)
    states = check(out, lambda: token_parquet.write_parquet(out), parquet_rows)
    assert states >= {"old", "refused"}


def pictures(out):
    return {path.relative_to(out).as_posix(): np.asarray(Image.open(path)).tobytes() for path in out.rglob("*.png")}


def each(old, new):
    """A reader for outputs whose files stand alone: it gives the old value while every file is old or new."""

    def read(out):
        found = pictures(out)
        same = found.keys() == old.keys() and all(found[name] in (old[name], new[name]) for name in old)
        return old if same and found != new else found

    return read


@killed_at_every(5, slow=2)
def test_decoded_pictures(photos, encode, tmp_path, tiny_tokenizer_folder, every):
    encode(photos[0], tmp_path / "tokens")
    decode = partial(cli, "decode", tmp_path / "tokens", "--model", tiny_tokenizer_folder, "--device", "cpu")
    decode("-o", tmp_path / "after", "--seed", 1)
    decode("-o", tmp_path / "out")
    command = partial(decode, "-o", tmp_path / "out", "--seed", 1, "--force")
    read = each(pictures(tmp_path / "out"), pictures(tmp_path / "after"))
    check(tmp_path / "out", command, read, every=every, after=tmp_path / "after")


@killed_at_every(11, slow=2)
@pytest.mark.parametrize("force", [True, False])
def test_drawn_pictures(tmp_path, tiny_tokenizer_folder, drawing_llm, force, every):  # noqa: F811
    """With their tokens, a grid and the list of prompts, which a second run without --force goes on with."""
    (tmp_path / "p.txt").write_text("ein Füchslein\ntwo dogs\n", encoding="utf-8")
    models = ["--model", drawing_llm, "--tokenizer", tiny_tokenizer_folder, "--device", "cpu", "--save-tokens"]
    draw = partial(cli, "generate", "--prompts", tmp_path / "p.txt", "--temp", "0.5,1", "--batch-size", 2, *models)
    out = tmp_path / "out"
    draw("-o", tmp_path / "after", "--cfg", 3)
    if force:
        draw("-o", out, "--cfg", 1)
        read = each(pictures(out), pictures(tmp_path / "after"))
        command = partial(draw, "-o", out, "--cfg", 3, "--force")
        states = check(out, command, read, every=every, after=tmp_path / "after", ignored=r".*\.jsonl|\..*")
        assert "old" in states
        return
    out.mkdir()
    final = content(tmp_path / "after")
    for _ in kills(out, partial(draw, "-o", out, "--cfg", 3), every):
        for path in out.glob("[!.]*.png"):
            Image.open(path).load()
        draw("-o", out, "--cfg", 3)
        assert content(out) == final


def test_a_grid_of_other_pictures_is_not_kept(tmp_path, tiny_tokenizer_folder, drawing_llm):  # noqa: F811
    """A second run with another temperature draws the grid anew, or says that one of others is there."""
    (tmp_path / "p.txt").write_text("a red fox\n")
    models = ["--model", drawing_llm, "--tokenizer", tiny_tokenizer_folder, "--device", "cpu", "-o", tmp_path / "o"]
    draw = ["generate", "--prompts", tmp_path / "p.txt", *models]
    cli(*draw, "--temp", "0.5,1")
    done = CliRunner().invoke(app, [*map(str, draw), "--temp", "0.5,1,1.5"])
    assert done.exit_code == 1 and "a-red-fox-grid.png: exists, drawn with temperatures [0.5, 1.0]" in done.stderr


@killed_at_every(17, slow=4)
def test_the_demo_page(tmp_path, photos, tiny_tokenizer_folder, drawing_llm, monkeypatch, every):  # noqa: F811
    """The page and every picture of it are whole; the page has timings, which differ."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    out = tmp_path / "out"

    def make(folder):
        demo(out, folder, "a red fox", 2, str(tiny_tokenizer_folder), str(drawing_llm), device="cpu")

    make(photos[0])
    old = (out / "index.html").read_bytes()

    def page(folder):
        text = (folder / "index.html").read_bytes()
        assert text == old or text.rstrip().endswith(b"</html>")
        return text == old

    check(out, partial(make, photos[1]), page, every=every, ignored=r"(.*/)?\..*|index\.html|tokens/manifest\.json")


@pytest.fixture(scope="module")
def results(tmp_path_factory, tiny_tokenizer_folder):
    """Two results of ``bench --json``, of the same images."""
    images = [(name, image.resize((32, 32))) for name, image in sample_photos()][:2]
    folder = tmp_path_factory.mktemp("results")
    for name in ("first", "second"):
        bench = run_bench({name: V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder)}, iter(images), keep=0)
        (folder / f"{name}.json").write_text(json.dumps(as_record(tables([bench]), [])))
    return folder


def test_pages_and_tables_of_a_bench(results, tmp_path):
    out = tmp_path / "out"
    files = ("--report", out / "page.html", "--csv", out / "table.csv")
    cli("bench", "join", results / "first.json", *files)
    old = content(out)
    command = partial(cli, "bench", "join", results / "first.json", results / "second.json", *files)
    command()
    new = shutil.copytree(out, tmp_path / "after")
    for name, data in old.items():
        (out / name).write_bytes(data)

    def read(folder):
        found = content(folder)
        return [found.get(name) == content(new)[name] for name in ("page.html", "table.csv")] == [True, True]

    check(out, command, read, after=new)


def loaded(cls):
    return lambda folder: [t.sum().item() for t in cls.from_pretrained(folder).state_dict().values()]


EXPORTS = r"(?!(config\.json|model\.safetensors)$).*"


@killed_at_every(3, slow=1)
def test_the_export_of_a_training(world, tmp_path, every):  # noqa: F811
    first = training_recipe(world, "autoencoder", tmp_path / "out", "train.steps=2")
    train(first, resume=False, log=quiet)
    second = dataclasses.replace(first, train=dataclasses.replace(first.train, save_dtype="bf16"))
    command = partial(train, second, resume=True, log=quiet)
    states = check(tmp_path / "out", command, loaded(V2FlowAutoencoder), every=every, ignored=EXPORTS)
    assert states >= {"old", "refused"}


@killed_at_every(7, slow=2)
def test_the_export_of_a_finetuned_llm(recipe, every):  # noqa: F811
    finetune(recipe, log=quiet)
    second = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, save_dtype="bf16"))
    read = lambda folder: [t.float().sum().item() for t in load_llm(str(folder), torch.float32)[0].parameters()]  # noqa: E731
    command = lambda: finetune(second, log=quiet, resume=True)  # noqa: E731
    states = check(Path(recipe.output), command, read, every=every, ignored=EXPORTS)
    assert states >= {"old", "refused"}


def test_save_pretrained_over_another_model(tiny_tokenizer_folder, tmp_path):
    out = shutil.copytree(tiny_tokenizer_folder, tmp_path / "out")
    (out / "model-of-mine.safetensors").write_bytes(b"not of this model")
    model = build_tiny_tokenizer()
    with torch.no_grad():
        model.flow.out.weight.add_(1.0)
    model.config.image_size = 64

    def read(folder):
        found = V2FlowTokenizer.from_pretrained(folder)
        return found.config.image_size, found.digest

    assert check(out, lambda: model.save_pretrained(out), read) >= {"old", "refused"}
    assert (out / "model-of-mine.safetensors").read_bytes() == b"not of this model"


def test_a_decoder_that_replaces_another_one(tiny_tokenizer_folder, tmp_path):
    trained = build_tiny_tokenizer()
    for name in ("first", "second"):
        with torch.no_grad():
            trained.flow.out.weight.add_(1.0)
        trained.save_pretrained(tmp_path / name)
    out = shutil.copytree(tiny_tokenizer_folder, tmp_path / "out")
    add_decoder(out, tmp_path / "first", default=True)
    command = partial(add_decoder, out, tmp_path / "second", default=True)
    check(out, command, lambda folder: V2FlowTokenizer.from_pretrained(folder).digest)


def test_weights_in_several_files_by_weights_in_one(tmp_path):
    """A move that was interrupted is finished by the next writer, even of something else; strange files stay."""
    out, shards = tmp_path / "out", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = "model.safetensors.index.json"

    def write(names, text):
        with publishing(out) as folder:
            for name in [*names, "config.json"]:
                (folder / name).write_text(text)

    def read(folder):
        from v2flow_cli.runtime.publishing import check_published

        check_published(folder)
        return {k: v for k, v in content(folder).items() if re.fullmatch(WEIGHTS, k) or k == "config.json"}

    write([*shards, index], "old")
    (out / "model-mine.safetensors").write_text("mine")
    assert check(out, partial(write, ["model.safetensors"], "new"), read) >= {"old", "refused"}
    assert not (out / index).exists() and (out / "model-mine.safetensors").read_text() == "mine"
    for _ in kills(out, partial(write, [*shards, index], "third")):
        try:
            before = read(out)
        except V2FlowError:
            before = dict.fromkeys([*shards, index, "config.json"], b"third")
        with pytest.raises(RuntimeError), publishing(out):  # a writer that fails has nevertheless finished the move
            raise RuntimeError
        assert read(out) == before


def test_what_a_budget_knows_of_its_stages(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    path = out / "budget-ae.json"
    StageRun("a.yaml", ["x=1"], 3.0).save(path)
    save = lambda: StageRun("a.yaml", ["x=1"], 9.0, done=True).save(path)  # noqa: E731
    check(out, save, lambda folder: StageRun.load(folder / path.name))


def script(name):
    spec = importlib.util.spec_from_file_location(Path(name).stem, RECIPES / name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[Path(name).stem] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def run_script(module, *arguments):
    sys.argv = [module.__name__, *map(str, arguments)]
    module.main()


def test_public_photos(tmp_path, monkeypatch):
    import hashlib

    monkeypatch.setattr(sys, "argv", sys.argv)
    module = script("eval/public_photos.py")
    files = {f"data/{name}.jpg": random.Random(name).randbytes(3000) for name in "abc"}
    module.PHOTOS = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    with zipfile.ZipFile(tmp_path / "all.whl", "w") as wheel:
        for name, data in files.items():
            wheel.writestr(f"p/{name}", data)
    out = tmp_path / "out"
    command = partial(run_script, module, tmp_path / "all.whl", "--out", out)
    command()
    final = content(out)
    (out / "c.jpg").unlink()  # as a run leaves it that was killed
    for _ in kills(out, command):
        assert all(data == final[name] for name, data in content(out).items() if not name.startswith("."))
        command()
        assert content(out) == final


def test_scenes_of_drawings(tmp_path, monkeypatch):
    import tarfile

    monkeypatch.setattr(sys, "argv", sys.argv)
    module = script("default/scenes.py")
    module.SHARD_IMAGES = 1
    with tarfile.open(tmp_path / "drawings.tar", "w") as tar:
        for number in range(3):
            image = Image.new("RGBA", (64, 48))
            ImageDraw.Draw(image).ellipse((8, 8, 40, 40), fill=(200, 60, 20 * number, 255))
            file = io.BytesIO()
            image.save(file, "WEBP", lossless=True)
            fact = {"title": "a bus", "category": "travel", "colours": ["red"], "colour_title": None, "kind": "emoji"}
            for suffix, data in (("webp", file.getvalue()), ("json", json.dumps(fact).encode())):
                member = tarfile.TarInfo(f"drawing-{number:02d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    out = tmp_path / "out"
    command = partial(run_script, module, "--drawings", tmp_path / "drawings.tar", "--out", out)
    command("--count", 3)
    read = lambda folder: {tar.path.name: tar.path.read_bytes() for tar in find_tars([folder])}  # noqa: E731
    states = check(out, partial(command, "--count", 2, "--seed", 1), read)
    assert states >= {"old", "refused"}
