"""What is built can be installed in an empty environment and does its work there."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
INSIDE = [
    "v2flow_cli/py.typed",
    "v2flow_cli/bench/report/report.html",
    "v2flow_cli/bench/report/parts.html",
    "v2flow_cli/demo/app.py",
    "v2flow_cli/assets/default/tokenizer/model.safetensors",
    "v2flow_cli/assets/default/tokenizer/config.json",
    "v2flow_cli/assets/flexible/model.safetensors",
    "v2flow_cli/assets/flexible/NOTICE",
    "v2flow_cli/assets/default/llm/model.safetensors",
    "v2flow_cli/assets/default/llm/tokenizer.json",
    "v2flow_cli/assets/photos/astronaut.png",
]


def run(*command: object, cwd: Path) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the source archive, built from the files in git."""
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


def needed_distributions(requirements: list[str]) -> dict[str, metadata.Distribution]:
    """What pip would install for ``requirements``, of what is installed here, by normalised name."""
    found: dict[str, metadata.Distribution] = {}
    seen, todo = set(), [Requirement(text) for text in requirements]
    while todo:
        wanted = todo.pop()
        name, extras = re.sub(r"[-_.]+", "-", wanted.name).lower(), tuple(sorted(wanted.extras))
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        found[name] = metadata.distribution(wanted.name)
        for text in found[name].requires or ():
            other = Requirement(text)
            if other.marker is None or any(other.marker.evaluate({"extra": extra}) for extra in extras or ("",)):
                todo.append(other)
    return found


@pytest.fixture(scope="module")
def plain_install(built: Path, tmp_path_factory) -> Path:
    """An environment with the wheel and what a plain install brings, without any extra; its ``bin`` folder.

    The packages are links to those of this environment: installing them again would take gigabytes.
    """
    folder = tmp_path_factory.mktemp("plain")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for distribution in needed_distributions(project["dependencies"]).values():
        for file in distribution.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    [wheel] = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return folder / "venv" / "bin"


@pytest.mark.slow
def test_the_first_commands_of_the_readme_work_on_a_plain_install(plain_install: Path, tmp_path: Path, sample_images):
    python, v2flow = plain_install / "python", plain_install / "v2flow"
    where = run(python, "-c", "import v2flow_cli; print(v2flow_cli.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(plain_install.parent)
    missing = "('diffusers', 'gradio', 'lpips', 'peft', 'pyarrow', 'scipy', 'skimage', 'tensorboard', 'torch_fidelity')"
    code = f"import importlib.util; print([m for m in {missing} if importlib.util.find_spec(m)])"
    assert run(python, "-c", code, cwd=tmp_path).strip() == "[]"
    assert run(v2flow, "--version", cwd=tmp_path).startswith("v2flow ")
    (tmp_path / "imgs").mkdir()
    sample_images[1].save(tmp_path / "imgs" / "cat.png")
    run(v2flow, "encode", "imgs/", "-o", "tokens/", cwd=tmp_path)
    run(v2flow, "decode", "tokens.npy", "--cfg", "3.0", cwd=tmp_path)
    assert (tmp_path / "decoded" / "cat.png").stat().st_size > 10_000
    run(v2flow, "generate", "a red fox", "--temp", "0.9", cwd=tmp_path)
    assert len(list((tmp_path / "generated").glob("*.png"))) == 1
    assert "PSNR" in run(v2flow, "bench", "--res", "512", "--limit", "1", "--no-speed", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("encode", "imgs/", "-o", "out/", "--parquet"), "parquet"),
        (("bench", "imgs/", "--fid", "--no-speed"), "metrics"),
        (("bench", "imgs/", "--lpips-net", "vgg", "--no-speed"), "metrics"),
    ],
)
def test_a_missing_extra_is_an_error_that_names_it(
    plain_install: Path, tmp_path: Path, sample_images, arguments, extra
) -> None:
    (tmp_path / "imgs").mkdir()
    sample_images[1].resize((64, 64)).save(tmp_path / "imgs" / "cat.png")
    done = subprocess.run([plain_install / "v2flow", *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"is not installed. Install it with: pip install 'v2flow[{extra}]'" in done.stderr


def test_shell_completion_lists_commands_and_options() -> None:
    def complete(line: str) -> str:
        env = {**os.environ, "_V2FLOW_COMPLETE": "complete_bash", "COMP_WORDS": line}
        env["COMP_CWORD"] = str(len(line.split()) - 1)
        code = "import sys; sys.argv = ['v2flow']; from v2flow_cli.__main__ import main; main()"
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout

    assert complete("v2flow enc").split() == ["encode"]
    assert "--parquet" in complete("v2flow encode --par")
