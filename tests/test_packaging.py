"""What is built can be installed in an empty environment and does its work there."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INSIDE = [
    "v2flow_cli/py.typed",
    "v2flow_cli/bench/report/report.html",
    "v2flow_cli/demo/app.py",
    "v2flow_cli/assets/default/tokenizer/model.safetensors",
    "v2flow_cli/assets/default/tokenizer/config.json",
    "v2flow_cli/assets/default/llm/model.safetensors",
    "v2flow_cli/assets/default/llm/tokenizer.json",
]


def run(*command: object, cwd: Path) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the source archive, built from the files that git knows."""
    checkout, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    archive = checkout / "source.tar"
    run("git", "archive", "--output", archive, "HEAD", cwd=ROOT)
    with tarfile.open(archive) as tar:
        tar.extractall(checkout, filter="data")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=checkout)
    return out


@pytest.mark.slow
def test_wheel_and_source_archive_hold_the_embedded_model(built: Path) -> None:
    [wheel], [source] = built.glob("*.whl"), built.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert [name for name in INSIDE if name not in names] == []
    with tarfile.open(source) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    needed = [*INSIDE, "LICENSE", "README.md", "pyproject.toml", "constraints.txt"]
    assert [name for name in needed if name not in packed] == []
    assert wheel.stat().st_size < 100 * 2**20


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(built: Path, tmp_path: Path, sample_images) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # The dependencies are those of this environment: installing them again would take gigabytes.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    [wheel] = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    v2flow = tmp_path / "venv" / "bin" / "v2flow"
    where = run(python, "-c", "import v2flow_cli; print(v2flow_cli.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(tmp_path / "venv")
    assert run(v2flow, "--version", cwd=tmp_path).startswith("v2flow ")
    (tmp_path / "imgs").mkdir()
    sample_images[1].save(tmp_path / "imgs" / "cat.png")
    run(v2flow, "encode", "imgs/", "-o", "tokens/", cwd=tmp_path)
    run(v2flow, "decode", "tokens/", "-o", "decoded/", cwd=tmp_path)
    assert (tmp_path / "decoded" / "cat.png").stat().st_size > 10_000
