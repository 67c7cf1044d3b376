"""A server with tiny models in a thread of this process, on a free port of loopback."""

import contextlib
import socket
import threading
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

import uvicorn

from tests.test_demo_page import llm_folder  # noqa: F401  a fixture
from v2flow_cli.serve.app import create_app
from v2flow_cli.serve.limits import Limits
from v2flow_cli.serve.tasks import Models


@pytest.fixture(scope="module")
def models(tiny_tokenizer_folder, llm_folder):  # noqa: F811
    return Models.load(str(tiny_tokenizer_folder), str(llm_folder), "cpu", "fp32")


@contextlib.contextmanager
def serving(models, api_key=None, **limits):
    """(base URL, the app's Service) of a running server."""
    app = create_app(models, Limits(**limits), api_key)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=30))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", app.state.service
    finally:
        server.should_exit = True
        thread.join(600)
        listener.close()
        assert not thread.is_alive()


def eventually(condition):
    """Waits for ``condition``; the test fails where it never holds."""
    for _ in range(30_000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came true")
