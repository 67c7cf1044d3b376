"""The live demo, asked over loopback as a browser would."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_demo_page import llm_folder  # noqa: F401  a fixture


@pytest.fixture(scope="module")
def client(tiny_tokenizer_folder: Path, llm_folder: Path):  # noqa: F811
    pytest.importorskip("gradio")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from gradio_client import Client

    from v2flow_cli.demo.app import Studio, build_app

    app = build_app(Studio(str(tiny_tokenizer_folder), str(llm_folder), "cpu"))
    _, url, _ = app.launch(server_name="127.0.0.1", quiet=True, prevent_thread_lock=True)
    assert url.startswith("http://127.0.0.1:")
    yield Client(url, verbose=False)
    app.close()


def pixels(file: str) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def test_a_photo_goes_in_and_comes_back(client, sample_images, tmp_path: Path) -> None:
    from gradio_client import handle_file

    sample_images[1].save(tmp_path / "cat.png")

    def ask(rounds: int = 1, steps: int = 2, guidance: float = 1.0, seed: int = 0) -> tuple:
        photo = handle_file(str(tmp_path / "cat.png"))
        return client.predict(photo, 4, rounds, steps, guidance, seed, api_name="/reconstruct")

    cropped, back, grid, figures = ask()
    assert pixels(cropped).shape == pixels(back).shape == (32, 32, 3)
    assert pixels(grid).shape == (512, 512, 3)
    assert figures.startswith("4 tokens of 64 codes: 3 bytes. PSNR ") and "SSIM" in figures
    assert np.array_equal(pixels(ask()[1]), pixels(back))
    for other in (ask(guidance=4.0), ask(seed=1), ask(steps=5), ask(rounds=4)):
        assert not np.array_equal(pixels(other[1]), pixels(back))


def test_a_sentence_becomes_a_picture(client) -> None:
    def ask(prompt: str, seed: int) -> np.ndarray:
        return pixels(client.predict(prompt, 0.9, 1, 2, 1.0, seed, api_name="/draw"))

    first = ask("a red fox", 0)
    assert first.shape == (32, 32, 3) and np.array_equal(ask("a red fox", 0), first)
    assert not np.array_equal(ask("a red fox", 1), first)


def test_what_is_missing_is_said(client) -> None:
    with pytest.raises(Exception, match="The prompt is empty"):
        client.predict(" ", 0.9, 1, 2, 1.0, 0, api_name="/draw")
    with pytest.raises(Exception, match="No photo yet"):
        client.predict(None, 4, 1, 2, 1.0, 0, api_name="/reconstruct")


def test_without_gradio_it_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import importlib.util, sys; find = importlib.util.find_spec; "
        "importlib.util.find_spec = lambda name, *a: None if name == 'gradio' else find(name, *a); "
        "from v2flow_cli.demo.__main__ import main; sys.argv = ['demo']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and 'pip install "v2flow[demo]"' in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_module_serves_the_embedded_models() -> None:
    pytest.importorskip("gradio")
    import urllib.request

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "v2flow_cli.demo", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline().strip() == f"http://127.0.0.1:{port}"
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60).read().decode()
        assert "v2flow" in page and process.poll() is None
    finally:
        process.terminate()
        process.wait(60)
