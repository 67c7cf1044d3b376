"""``python -m v2flow_cli.serve`` as a process of its own."""

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from PIL import Image


@pytest.fixture
def start(tmp_path):
    """start(*options) -> (process, URL once it answers)."""
    processes = []

    def run(*options, **environment):
        process = subprocess.Popen(
            [sys.executable, "-m", "v2flow_cli.serve", "--port", "0", "--device", "cpu", *options],
            stdout=subprocess.PIPE,
            stderr=(tmp_path / "log").open("w"),
            text=True,
            env=os.environ | environment,
        )
        processes.append(process)
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), (tmp_path / "log").read_text()
        return process, url

    yield run
    for process in processes:
        process.kill()
        process.wait(60)


def test_sigterm_finishes_running_requests(start, tiny_tokenizer_folder, llm_folder, tmp_path):
    options = ("--tokenizer", str(tiny_tokenizer_folder), "--model", str(llm_folder), "--dtype", "fp32")
    process, url = start(*options, V2FLOW_API_KEY="secret")
    answers = []
    ask = dict(json={"prompt": "a red fox", "n": 10}, headers={"Authorization": "Bearer secret"}, timeout=300)
    assert httpx.post(f"{url}/v1/images/generations", json=ask["json"], timeout=300).status_code == 401
    asking = threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/v1/images/generations", **ask)))
    asking.start()
    while "v2flow_requests_in_flight 1.0" in httpx.get(f"{url}/metrics", timeout=300).text and asking.is_alive():
        pass  # until it is taken (then there are two: it and the question)
    process.send_signal(signal.SIGTERM)
    asking.join(300)
    (answer,) = answers
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["data"]) == 10
    assert process.wait(120) == 0 and process.stdout.read() == ""
    log = (tmp_path / "log").read_text()
    assert "POST /v1/images/generations" in log and "Traceback" not in log


def test_a_used_port_and_missing_packages():
    def fails(code):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 1 and "Traceback" not in done.stderr and done.stdout == ""
        return done.stderr

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code = (
            f"import sys; from v2flow_cli.serve.__main__ import main; sys.argv = ['serve', '--port', '{port}']; main()"
        )
        assert f"--host 127.0.0.1 --port {port}: Address already in use. Use another address." in fails(code)
    missing = "import sys; sys.modules['uvicorn'] = None; "
    missing += "from v2flow_cli.serve.__main__ import main; sys.argv = ['serve']; main()"
    assert "the server needs the package uvicorn" in fails(missing)


GPU_LIBRARIES = ("/nvidia/", "/triton/", "/cuda/", "libtorch_cuda", "libc10_cuda")  # of PyTorch's GPU build


def resident_bytes(pid: int) -> int:
    """Resident memory of a process without what the GPU libraries, which a CPU does not use, hold of it."""
    total, name = 0, ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0]:
            name = fields[5] if len(fields) > 5 else ""
        elif fields[0] == "Rss:" and not any(part in name for part in GPU_LIBRARIES):
            total += 1024 * int(fields[1])
    return total


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_the_embedded_models_in_at_most_1_2_gb(start, sample_images):
    process, url = start("--timeout", "3000")
    file = io.BytesIO()
    sample_images[0].save(file, "JPEG")
    sizes = [resident_bytes(process.pid)]
    for _ in range(3):
        drawn = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a red fox", "n": 8}, timeout=3000).json()
        encoded = httpx.post(f"{url}/v1/images/tokens", files={"image": file.getvalue()}, timeout=3000).json()
        ask = {"tokens": [encoded["data"][0]["tokens"]] * 8}
        decoded = httpx.post(f"{url}/v1/tokens/images", json=ask, timeout=3000).json()
        sizes.append(resident_bytes(process.pid))
    for answer in (drawn, decoded):
        assert Image.open(io.BytesIO(base64.b64decode(answer["data"][7]["b64_json"]))).size == (256, 256)
    assert max(sizes) <= 1.2e9, sizes
