"""9. The resident memory of `encode` and `decode` does not grow with the set: that of the commands themselves.

At 256 px, because it is buffers of that size that small things which stay can keep from being used again.
"""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.store.test_shards import write_tar
from v2flow_cli.assets import sample_photos

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
GROWTH = 1.05  # of the resident memory, from a tenth (slow) or a quarter of the set to all of it
LIMIT_MB = 1600  # embedded model, batches of 8
BATCH = ["--batch-size", "8", "--device", "cpu", "--dtype", "fp32"]


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def watch(arguments: list) -> dict[int, float]:
    """Resident megabytes of a `v2flow` command by the number of images that it says it has done."""
    command = [sys.executable, "-m", "v2flow_cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}  # images share out two threads, as on any CPU
    seen, lines = {}, []
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **streams) as run:
        for line in run.stderr:
            lines.append(line)
            if done := re.match(r"\w+: (\d+)", line):
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
    """``early`` and ``late``, images: the first lines that say so many or more."""
    early, late = (min(count for count in seen if count >= wanted) for wanted in (early, late))
    print({count: round(seen[count]) for count in (early, late)}, "MB at so many images")
    assert seen[late] < GROWTH * seen[early], seen


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
