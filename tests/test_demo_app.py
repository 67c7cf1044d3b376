"""The live demo, called over loopback as by a browser."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.test_generate import untrained_llm
from tests.test_demo_page import llm_folder  # noqa: F401  a fixture
from tests.tokenizer.test_seams import build


@pytest.fixture(scope="module")
def client(tiny_tokenizer_folder: Path, llm_folder: Path):  # noqa: F811
    yield from serve(tiny_tokenizer_folder, llm_folder)


@pytest.fixture(scope="module")
def flexible(tmp_path_factory):
    """A page of a tokenizer of 1 to 6 tokens, and an LLM that draws them."""
    folder = tmp_path_factory.mktemp("flexible")
    build().save_pretrained(folder / "tokenizer")
    untrained_llm(folder / "tokenizer", folder / "llm")
    yield from serve(folder / "tokenizer", folder / "llm")


def serve(tokenizer: Path, llm: Path | None):
    pytest.importorskip("gradio")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from gradio_client import Client

    from v2flow_cli.demo.app import build_app
    from v2flow_cli.demo.studio import Studio

    app = build_app(Studio(str(tokenizer), None if llm is None else str(llm), "cpu"))
    _, url, _ = app.launch(server_name="127.0.0.1", quiet=True, prevent_thread_lock=True)
    assert url.startswith("http://127.0.0.1:")
    yield Client(url, verbose=False)
    app.close()


def pixels(file: str) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def test_a_photo_is_encoded_and_decoded(client, sample_images, tmp_path: Path) -> None:
    from gradio_client import handle_file

    sample_images[1].save(tmp_path / "cat.png")

    def ask(rounds: int = 1, steps: int = 2, guidance: float = 1.0, seed: int = 0, **more: float) -> tuple:
        photo = handle_file(str(tmp_path / "cat.png"))
        noise = {"param_7": more["noise"]} if more else {}  # without it, the decoder's own
        return client.predict(photo, 4, rounds, steps, guidance, seed, api_name="/reconstruct", **noise)

    cropped, back, grid, figures = ask()
    assert pixels(cropped).shape == pixels(back).shape == (32, 32, 3)
    assert pixels(grid).shape == (512, 512, 3)
    assert figures.startswith("4 tokens of 64 codes: 3 bytes. PSNR ") and "SSIM" in figures
    assert np.array_equal(pixels(ask()[1]), pixels(back))
    for other in (ask(guidance=4.0), ask(seed=1), ask(steps=5), ask(rounds=4), ask(noise=0.5)):
        assert not np.array_equal(pixels(other[1]), pixels(back))
    assert np.array_equal(pixels(ask(noise=0)[1]), pixels(ask(noise=0, seed=1)[1]))  # the mean has no seed


def test_the_slider_shortens_a_drawing(flexible, sample_images, tmp_path: Path) -> None:
    from gradio_client import handle_file

    sample_images[1].save(tmp_path / "cat.png")
    back = []
    for count in (1, 3, 6):
        _, picture, _, figures = flexible.predict(
            handle_file(str(tmp_path / "cat.png")), count, 1, 2, 1.0, 0, api_name="/reconstruct"
        )
        assert figures.startswith(f"{count} tokens of ")
        back.append(pixels(picture).tobytes())
    assert len(set(back)) == 3
    with pytest.raises(Exception, match="No drawing: press Draw"):
        flexible.predict(1, 1, 2, 1.0, 0, api_name="/shorten")
    drawn, _ = flexible.predict("a red fox", 0.0, 1, 2, 1.0, 0, api_name="/draw")
    short = [pixels(flexible.predict(count, 1, 2, 1.0, 0, api_name="/shorten")[0]) for count in (1, 6)]
    assert not np.array_equal(short[0], short[1]) and np.array_equal(short[1], pixels(drawn))


def test_only_flexible_lengths_have_sliders(flexible, client) -> None:
    def sliders(page):
        parts = page.config["components"]
        return [p["props"]["label"] for p in parts if p["type"] == "slider" and p["props"].get("visible", True)]

    assert {"Tokens", "Tokens of the drawing"} <= set(sliders(flexible))
    assert not {"Tokens", "Tokens of the drawing"} & set(sliders(client))


def test_a_tokenizer_without_a_language_model_has_the_photo_tab_alone(tmp_path: Path, sample_images) -> None:
    from gradio_client import handle_file

    from v2flow_cli.demo.studio import Studio
    from v2flow_cli.errors import V2FlowError

    build().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(V2FlowError, match="Name one with --llm"):
        Studio(str(tmp_path / "tokenizer"), device="cpu").draw("a red fox", 0.0, 0)
    sample_images[1].save(tmp_path / "cat.png")
    for page in serve(tmp_path / "tokenizer", None):
        tabs = [part["props"]["label"] for part in page.config["components"] if part["type"] == "tabitem"]
        assert tabs == ["Photo to tokens and back"]
        *_, figures = page.predict(handle_file(str(tmp_path / "cat.png")), 2, *DECODER, api_name="/reconstruct")
        assert figures.startswith("2 tokens of ")


DECODER = (1, 2, 1.0, 0)  # rounds, steps, guidance, seed


def test_a_prompt_is_drawn(client) -> None:
    def ask(prompt: str, seed: int) -> np.ndarray:
        drawn, grid = client.predict(prompt, 0.9, 1, 2, 1.0, seed, api_name="/draw")
        assert pixels(grid).shape == (512, 512, 3)
        return pixels(drawn)

    first = ask("a red fox", 0)
    assert first.shape == (32, 32, 3) and np.array_equal(ask("a red fox", 0), first)
    assert not np.array_equal(ask("a red fox", 1), first)


def test_tokens_of_a_photo_are_edited_and_decoded(client, sample_images, tmp_path: Path) -> None:
    from gradio_client import handle_file

    sample_images[1].save(tmp_path / "cat.png")
    corners = (0, 1, 1, 1)  # the right half of 2 x 2 tokens
    grid, before = client.predict(handle_file(str(tmp_path / "cat.png")), *corners, *DECODER, api_name="/tokens")
    start = pixels(grid)
    assert (start[5:, 256 + 1] == 255).all(-1)[1:500].any()  # the rectangle's border
    for how in ("resampled by the language model", "one code", "random codes"):
        grid, after = client.predict(how, 7, "a red fox", 1.0, 3, *corners, *DECODER, api_name="/edit")
        changed = pixels(grid)
        assert np.array_equal(changed[:, :250], start[:, :250])
        assert not np.array_equal(changed[:, 262:], start[:, 262:])
        assert not np.array_equal(pixels(after), pixels(before))
    grid, _ = client.predict("two dogs", 0.9, *corners, *DECODER, api_name="/draw_tokens")
    assert not np.array_equal(pixels(grid)[:, :250], start[:, :250])


def test_only_tokens_in_the_rectangle_change(tiny_tokenizer_folder: Path, llm_folder: Path) -> None:  # noqa: F811
    from v2flow_cli.demo.studio import BY_LLM, ONE_CODE, RANDOM_CODES, Studio
    from v2flow_cli.errors import V2FlowError

    studio = Studio(str(tiny_tokenizer_folder), str(llm_folder), "cpu")
    ids = [1, 2, 3, 4]
    assert studio.can_resample and studio.grid_shape(4) == (2, 2)
    assert studio.edit(ids, (1, 1, 0, 1), ONE_CODE, code=9) == [1, 9, 3, 9]  # corners in any order
    assert studio.edit(ids, (0, 0, 99, 99), ONE_CODE, code=9) == [9] * 4  # and beyond the edge
    random = studio.edit(ids, (1, 0, 1, 1), RANDOM_CODES, seed=1)
    assert random[:2] == [1, 2] and random == studio.edit(ids, (1, 0, 1, 1), RANDOM_CODES, seed=1)
    drawn = studio.draw("a red fox", 1.0, 5)
    assert studio.edit(drawn, (0, 0, 1, 1), BY_LLM, prompt="a red fox", seed=5) == drawn
    edited = studio.edit(ids, (1, 0, 1, 0), BY_LLM, prompt="a red fox", seed=5)
    assert edited[:2] == [1, 2] and edited[3] == 4
    assert studio.token_at(ids, 511, 511) == (1, 1) and studio.token_at(ids, 0, 300) == (1, 0)
    with pytest.raises(V2FlowError, match="Code 64: expected 0 to 63"):
        studio.edit(ids, (0, 0, 0, 0), ONE_CODE, code=64)
    with pytest.raises(V2FlowError, match="2 tokens, but the language model writes 4"):
        studio.edit([1, 2], (0, 0, 0, 0), BY_LLM)


def test_missing_inputs_are_errors(client) -> None:
    with pytest.raises(Exception, match="The prompt is empty"):
        client.predict(" ", 0.9, *DECODER, api_name="/draw")
    with pytest.raises(Exception, match="No photo: drop"):
        client.predict(None, 4, *DECODER, api_name="/reconstruct")
    with pytest.raises(Exception, match="No photo: drop"):
        client.predict(None, 0, 0, 1, 1, *DECODER, api_name="/tokens")


def test_without_gradio_the_error_names_the_extra(tmp_path: Path) -> None:
    code = "import sys; sys.modules['gradio'] = None; "
    code += "from v2flow_cli.demo.__main__ import main; sys.argv = ['demo']; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install 'v2flow[demo]'" in done.stderr and "Traceback" not in done.stderr


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
