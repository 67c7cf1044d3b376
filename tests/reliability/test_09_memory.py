"""9. The memory of `encode`, `decode`, `bench` and `finetune-llm` does not grow with the set or the number of steps.

It is the resident memory of the commands themselves, at 256 px, because it is buffers of that size that small things
which stay can keep from being used again. The everyday tests of `bench` and `finetune-llm` count objects and bytes
instead.
"""

import gc
import io
import itertools
import os
import re
import statistics
import subprocess
import sys
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import RECIPES
from tests.llm.conftest import SENTENCES, make_llm, write_token_set
from tests.store.test_shards import write_tar
from v2flow_cli.assets import sample_photos
from v2flow_cli.bench.candidates import Reconstruction, System
from v2flow_cli.bench.evaluate import evaluate
from v2flow_cli.recipe import load_recipe
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.training.objectives.drawing import finetune
from v2flow_cli.training.objectives.language_model import train_tokenizer

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
GROWTH = 1.05  # of the resident memory, from a tenth (slow) or a quarter of the set to all of it
LIMIT_MB = 1600  # embedded model, batches of 8
BATCH = ["--batch-size", "8", "--device", "cpu", "--dtype", "fp32"]


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def watch(arguments: list) -> dict[int, float]:
    """Resident megabytes of a `v2flow` command by the number of images or steps that it says it has done."""
    command = [sys.executable, "-m", "v2flow_cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}  # images share out two threads, as on any CPU
    seen, lines = {}, []
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **streams) as run:
        for line in run.stderr:
            lines.append(line)
            if done := re.match(r"(?:\w+:|step) (\d+)", line):
                seen[int(done[1])] = resident_mb(run.pid)
    assert run.returncode == 0, "".join(lines)
    return seen


def pictures(count: int):
    """(name, bytes) of 256 px JPEGs and WebPs, no two of one kind alike."""
    photos = [photo.convert("RGB") for _, photo in sample_photos()]
    for i in range(count):
        photo = photos[i % len(photos)]
        side = min(photo.size) * (50 + i % 50) // 100
        left, top = (i * 7) % (photo.width - side + 1), (i * 3) % (photo.height - side + 1)
        buffer = io.BytesIO()
        kind = ("jpg", "JPEG") if i % 2 else ("webp", "WEBP")
        photo.resize((256, 256), box=(left, top, left + side, top + side)).save(buffer, kind[1], quality=80)
        yield f"{i:06d}.{kind[0]}", buffer.getvalue()


def write_tars(folder: Path, count: int, per_tar: int) -> Path:
    folder.mkdir()
    members = pictures(count)
    for i in range(count // per_tar):
        write_tar(folder / f"s-{i:05d}.tar", [next(members) for _ in range(per_tar)])
    return folder


def check(seen: dict[int, float], early: int, late: int) -> None:
    """Compare the medians of the lines from ``early`` to twice as many images or steps, and up to ``late``.

    A single line shows up to 6% more or less, by the moment in a batch at which it is read.
    """
    first = [mb for count, mb in seen.items() if early <= count <= 2 * early]
    last = [mb for count, mb in seen.items() if late - early <= count <= late]
    before, after = statistics.median(first), statistics.median(last)
    print(f"{before:.0f} MB at {early} to {2 * early} images or steps, {after:.0f} at {late - early} to {late}")
    assert after < GROWTH * before, seen


@pytest.mark.parametrize("per_tar", [400, 20])
def test_encode_and_decode(tmp_path, tiny_tokenizer_folder, per_tar):
    tars = write_tars(tmp_path / "tars", 400, per_tar)
    model = ["--model", tiny_tokenizer_folder]
    check(watch(["encode", tars, "-o", tmp_path / "tokens", "--res", "256", *model, *BATCH]), 100, 400)
    if per_tar == 400:
        check(watch(["decode", tmp_path / "tokens", "-o", tmp_path / "decoded", *model, *BATCH]), 120, 400)


@pytest.mark.slow
@pytest.mark.parametrize("per_tar", [20_000, 100])
def test_encode_twenty_thousand_with_the_embedded_model(tmp_path, per_tar):
    seen = watch(["encode", write_tars(tmp_path / "tars", 20_000, per_tar), "-o", tmp_path / "tokens", *BATCH])
    check(seen, 2_000, 20_000)
    assert max(seen.values()) < LIMIT_MB


def test_bench_holds_one_batch_and_the_figures():
    held, bytes_at, done = {"photos": [], "references": [], "pictures": []}, {}, 0

    def alive(name):
        return sum(reference() is not None for reference in held[name])

    def reconstruct(batch):
        out = batch.reference.clone()
        held["references"].append(weakref.ref(batch.reference))
        held["pictures"].append(weakref.ref(out))
        return Reconstruction(out, [3] * len(out))

    def images(count):
        for i in range(count):
            photo = Image.fromarray(np.full((32, 32, 3), i, dtype=np.uint8))
            held["photos"].append(weakref.ref(photo))
            yield f"photo {i:06d}", photo

    def tick(advance):
        nonlocal done
        done += advance
        bytes_at[done] = tracemalloc.get_traced_memory()[0]
        # The photos of two batches, the last one with the output of two systems.
        assert alive("photos") <= 16 and alive("references") <= 4 and alive("pictures") <= 2

    systems = [System(name, "external", name, reconstruct) for name in ("a", "b")]
    tracemalloc.start()
    try:
        result = evaluate(images(240), systems, size=32, batch_size=8, tick=tick)
    finally:
        tracemalloc.stop()
    assert len(result.images) == 480
    assert (bytes_at[240] - bytes_at[40]) / 400 < 1000  # the figures of an image and system


@pytest.mark.slow
def test_bench_with_the_embedded_model(tmp_path):
    for name, content in pictures(600):
        (tmp_path / name).write_bytes(content)
    check(watch(["bench", tmp_path, "--no-codecs", "--no-speed", *BATCH]), 120, 600)


def drawing_recipe(folder, tokenizer_folder, images, length, *settings):
    """The settings of a fine-tuning of a random LLM on a token set of random ids, for a recipe or for `--set`."""
    words = train_tokenizer(SENTENCES * 3, 300)
    make_llm("llama", len(words)).save_pretrained(folder / "llm")
    words.save_pretrained(folder / "llm")
    digest = V2FlowTokenizer.from_pretrained(tokenizer_folder).token_digest
    write_token_set(folder / "tokens", digest, images, length)
    paths = [f"llm={folder / 'llm'}", f"tokenizer={tokenizer_folder}", f"output={folder / 'out'}"]
    return [*paths, f"data.token_sets=[{folder / 'tokens'}]", "train.save_every=0", "train.save_minutes=0", *settings]


def test_a_step_of_finetune_llm_leaves_nothing(tmp_path, tiny_tokenizer_folder):
    settings = drawing_recipe(tmp_path, tiny_tokenizer_folder, 12, 4, "train.steps=240", "train.log_every=40")
    bytes_at = []

    def log(line):
        if line.startswith("step "):
            gc.collect()
            bytes_at.append(tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    try:
        finetune(load_recipe(RECIPES / "tiny" / "llm.yaml", settings), log=log)
    finally:
        tracemalloc.stop()
    assert len(bytes_at) == 6
    # What a step leaves grows from every line to the next; what Python stores on a first use, only between a few.
    growth = statistics.median(after - before for before, after in itertools.pairwise(bytes_at))
    assert growth / 40 < 300  # with a log line among 40 steps


@pytest.mark.slow
def test_finetune_llm_on_twenty_thousand_pictures(tmp_path, tiny_tokenizer_folder):
    last = {}
    for images in (2_000, 20_000):
        folder = tmp_path / str(images)
        folder.mkdir()
        steps = ["train.steps=400", "train.log_every=50", "data.shuffle_window=20000"]
        settings = drawing_recipe(folder, tiny_tokenizer_folder, images, 4, *steps)
        overrides = [word for setting in settings for word in ("--set", setting)]
        seen = watch(["finetune-llm", RECIPES / "tiny" / "llm.yaml", *overrides])
        check(seen, 50, 400)
        last[images] = seen[400]
    assert last[20_000] - last[2_000] < 18_000 * 1000 / 2**20, last  # bytes a picture: ids, key, captions
