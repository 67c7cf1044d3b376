"""Every command with each of its standard streams closed, without a reader, or on a full disk: its work is done.

The commands run in forks of this process (tests/commands.py).
"""

import hashlib
import importlib.util
import json
import shutil
import sys
import tarfile
import zipfile

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torchvision.models import squeezenet1_1

from tests.bench.drawings import shape, write_tar
from tests.commands import run
from tests.conftest import RECIPES
from tests.llm.conftest import SENTENCES, make_llm, write_token_set
from tests.test_demo_page import llm_folder  # noqa: F401  (a fixture)
from v2flow_cli.assets import sample_photos
from v2flow_cli.bench.results import as_record, tables
from v2flow_cli.bench.run import run_bench
from v2flow_cli.cli.entry import run_script
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.autoencoder import V2FlowAutoencoder, V2FlowAutoencoderConfig
from v2flow_cli.training.objectives.language_model import train_tokenizer

V2FLOW = "v2flow_cli.__main__"
NAME = "katzé"


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_tokenizer_folder, llm_folder):  # noqa: F811
    """Inputs of every command in one folder: photos, one with a name outside ASCII, tokens, models, drawings, text."""
    root = tmp_path_factory.mktemp("streams")
    (root / "in").mkdir()
    for name, (_, photo) in zip((NAME, "dog"), sample_photos()):
        photo.resize((40, 40)).save(root / "in" / f"{name}.png")
        (root / "in" / f"{name}.txt").write_text(f"a {name}\n", encoding="utf-8")
    (root / "tokenizer").symlink_to(tiny_tokenizer_folder)
    (root / "llm").symlink_to(llm_folder)
    digest = V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder).token_digest
    write_token_set(root / "pairs", digest=digest)
    words = train_tokenizer(SENTENCES * 3, 300)
    for part in (words, make_llm("llama", len(words))):
        part.save_pretrained(root / "text-llm")
    write_tar(root / "drawings.tar", hands=2)
    shape("disc", "red").save(root / "disc.webp", lossless=True)
    fact = {"title": "disc", "category": "objects", "colours": ["red"], "colour_title": "red disc", "kind": "emoji"}
    (root / "disc.json").write_text(json.dumps(fact))
    with tarfile.open(root / "cut-outs.tar", "w") as tar:
        for name in ("disc.webp", "disc.json"):
            tar.add(root / name, name)
    torch.manual_seed(0)
    save_file(squeezenet1_1(weights=None).state_dict(), root / "features.safetensors")
    stages = {"make": {"run": "python -c 1", "share": 1}}
    (root / "budget.yaml").write_text(yaml.safe_dump({"kind": "budget", "folder": "out", "stages": stages}))
    (root / "prompts.txt").write_text(f"a {NAME}\n", encoding="utf-8")
    (root / "text.txt").write_text("\n".join(f"a red fox number {i} runs" for i in range(30)))
    assert run(V2FLOW, "encode", "in", "-o", "tokens", "--model", "tokenizer", cwd=root).code == 0
    images = [(name, image.resize((32, 32))) for name, image in sample_photos()][:2]
    bench = run_bench({NAME: V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder)}, iter(images), keep=0)
    (root / "bench.json").write_text(json.dumps(as_record(tables([bench]), [])))
    V2FlowAutoencoder(
        V2FlowAutoencoderConfig(encoder_width=16, encoder_depth=1, decoder_width=16, decoder_depth=1)
    ).save_pretrained(root / "ae")
    cost = (RECIPES / "tiny" / "tokenizer.yaml").read_text(encoding="utf-8")
    cost = cost.replace("runs/tiny/autoencoder", "ae").replace("runs/tiny/lm", "text-llm")
    (root / "cost.yaml").write_text(cost, encoding="utf-8")
    return root


TINY = RECIPES / "tiny"
MODELS = "--model tokenizer --llm-model llm"
EXPORT = "README.md config.json model.safetensors recipe.yaml"
# Arguments, and the files that are in ``out`` at the end, also where nobody reads the result.
COMMANDS = {
    "shard": ("shard in -o out", "manifest.json shard-000000.tar shard-000000.index.jsonl"),
    "encode": (
        "encode in -o out --model tokenizer --parquet",
        f"manifest.json dog.npy {NAME}.npy dog.samples.jsonl tokens-00000.parquet",
    ),
    "decode": ("decode tokens -o out --model tokenizer", f"dog.png {NAME}.png"),
    "generate": (
        "generate --prompts prompts.txt -o out --model llm --tokenizer tokenizer --temp 0.5,1",
        f"a-{NAME}-t0.5-s0.png a-{NAME}-t1-s0.png a-{NAME}-grid.png generated.jsonl",
    ),
    "train": (
        f"train {TINY}/autoencoder.yaml --set data.sources=[in] --set data.crop_size=16 --set output=out"
        " --set train.batch_size=2 --set train.steps=2 --set train.log_every=1",
        f"{EXPORT} metrics.jsonl checkpoints/step-00000002/state.json",
    ),
    "finetune-llm": (
        f"finetune-llm {TINY}/llm.yaml --set llm=text-llm --set tokenizer=tokenizer --set output=out"
        " --set data.token_sets=[pairs] --set train.steps=2 --set train.log_every=1",
        f"{EXPORT} tokenizer.json checkpoints/checkpoint-2/sha256.json",
    ),
    "finetune-llm from text": (
        f"finetune-llm {TINY}/lm.yaml --set text=[text.txt] --set output=out --set train.steps=2",
        f"{EXPORT} tokenizer.json checkpoints/checkpoint-2/sha256.json",
    ),
    "budget": ("budget budget.yaml --minutes 0.1", "budget.json"),
    "bench": ("bench in --model tokenizer --no-speed --csv out/t.csv --report out/p.html", "t.csv p.html"),
    "bench draw": (
        f"bench draw drawings.tar --features features.safetensors {MODELS} --prompts prompts.txt -o out"
        " --report out/p.html",
        f"a-{NAME}-t1-s0.png p.html",
    ),
    "bench llm": (f"bench llm in {MODELS}", ""),
    "bench alignment": ("bench alignment --model tokenizer", ""),
    "bench cost": ("bench cost cost.yaml --batches 1 --res 32", ""),
    "bench join": ("bench join bench.json --csv out/t.csv --report out/p.html", "t.csv p.html"),
    "demo.page": ("-o out --images in --model tokenizer --llm llm --device cpu", f"index.html tokens/{NAME}.npy"),
    "public_photos.py": ("all.whl --out out", f"{NAME}.png"),
    "scenes.py": ("--drawings cut-outs.tar --out out --layout centred --per-title 1", "scenes-000.tar"),
}
# Streams, and the exit code.
STREAMS = {
    "stdout closed": (dict(out="closed"), 0),
    "stderr closed": (dict(err="closed"), 0),
    "all closed": (dict(stdin="closed", out="closed", err="closed"), 0),
    "stdout without a reader": (dict(out="gone"), 141),
    "stderr without a reader": (dict(err="gone"), 0),
    "both without a reader": (dict(out="gone", err="gone"), 141),
    "stdout on a full disk": (dict(out="full"), 1),
    "stderr on a full disk": (dict(err="full"), 0),
    "both on a full disk": (dict(out="full", err="full"), 1),
    "ASCII": (dict(encoding="ascii"), 0),
}
EVERYDAY = {
    ("shard", "stderr closed"),
    ("shard", "all closed"),
    ("encode", "stderr without a reader"),
    ("decode", "stdout without a reader"),
    ("decode", "ASCII"),
    ("generate", "stdout on a full disk"),
    ("train", "both without a reader"),
    ("finetune-llm", "stderr closed"),
    ("budget", "both on a full disk"),
    ("bench join", "stderr on a full disk"),
    ("bench join", "stdout closed"),
    ("public_photos.py", "stdout without a reader"),
    ("public_photos.py", "stdout on a full disk"),
    ("scenes.py", "stdout without a reader"),
}


def script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def command(world):
    """``command(name, **streams)`` ends as that of COMMANDS, which starts without a folder ``out``."""
    photo = world / "in" / f"{NAME}.png"
    photos, scenes = script(RECIPES / "eval" / "public_photos.py"), script(RECIPES / "default" / "scenes.py")
    photos.PHOTOS = {f"in/{NAME}.png": hashlib.sha256(photo.read_bytes()).hexdigest()}
    with zipfile.ZipFile(world / "all.whl", "w") as wheel:
        wheel.write(photo, f"in/{NAME}.png")
    entries = {
        "demo.page": "v2flow_cli.demo.page",
        "public_photos.py": photos.main,
        "scenes.py": lambda: run_script(scenes.main),
    }

    def start(name, **streams):
        shutil.rmtree(world / "out", ignore_errors=True)
        return run(entries.get(name, V2FLOW), *COMMANDS[name][0].split(), cwd=world, **streams)

    return start


@pytest.mark.parametrize(
    ("name", "streams"),
    [
        pytest.param(name, streams, marks=[] if (name, streams) in EVERYDAY else pytest.mark.slow)
        for name in COMMANDS
        for streams in STREAMS
    ],
)
def test_the_work_is_done_whatever_becomes_of_its_output(command, world, name, streams):
    (options, code), files = STREAMS[streams], COMMANDS[name][1].split()
    ended = command(name, **options)
    assert ended.code == code, ended
    assert "Traceback" not in ended.err and "Exception ignored" not in ended.err, ended.err
    errors = [line for line in ended.err.splitlines() if "error" in line.lower() or "cannot be written" in line]
    assert len(errors) == (code == 1 and options.get("err") != "full"), ended.err
    assert not errors or "cannot be written (No space left on device)." in errors[0]
    assert "out" in options or ended.out
    assert all((world / "out" / file).stat().st_size for file in files)
    assert not [path for path in (world / "out").rglob(".*")]


@pytest.mark.parametrize("arguments", ["bench draw --help", "--version"])
def test_help(arguments):
    for out, err, code in (("gone", "kept", 141), ("full", "kept", 1), ("full", "gone", 1), ("closed", "closed", 0)):
        ended = run(V2FLOW, *arguments.split(), out=out, err=err)
        assert ended.code == code and "Traceback" not in ended.err, (out, err, ended)
        assert bool(ended.err) == (out == "full" and err == "kept")


@pytest.mark.parametrize(("arguments", "code"), [("encode in", 2), ("", 2), ("shard none -o out", 1)])
def test_the_exit_code_of_an_error_that_cannot_be_shown(arguments, code):
    for err in ("closed", "gone", "full"):
        ended = run(V2FLOW, *arguments.split(), err=err)
        assert (ended.code, ended.out, ended.err) == (code, "", ""), err
