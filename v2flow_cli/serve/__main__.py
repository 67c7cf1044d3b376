"""``python -m v2flow_cli.serve``: runs the server on this machine until SIGTERM or Ctrl-C."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
import signal
import socket
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from v2flow_cli.cli import options
from v2flow_cli.cli.console import log, result
from v2flow_cli.cli.entry import run
from v2flow_cli.errors import V2FlowError
from v2flow_cli.runtime.extras import extra

KEY_VARIABLE = "V2FLOW_API_KEY"
PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    model: options.Llm = None,
    tokenizer: options.ImageTokenizer = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 accepts other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 means any free port.")] = 8000,
    max_batch: Annotated[int, typer.Option(min=1, help="Largest batch, images.")] = 8,
    max_waiting: Annotated[int, typer.Option(min=10, help="Largest queue, images; more requests get 429.")] = 64,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="Largest body of a request, MB.")] = 10.0,
    max_megapixels: Annotated[
        float, typer.Option(min=0.001, max=50.0, help="Largest image in a request, megapixels.")
    ] = 16.0,
    max_side: Annotated[int, typer.Option(min=1, help="Largest side of an encoded or decoded image, pixels.")] = 512,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Longest time until the response, seconds; then 504.")
    ] = 120.0,
    url_minutes: Annotated[float, typer.Option(min=0.01, help="Lifetime of a picture's URL, minutes.")] = 60.0,
) -> None:
    """Serve the models over HTTP, with the endpoints of OpenAI's image API.

    Clients need a key if the environment variable V2FLOW_API_KEY is set.
    """
    for package in PACKAGES:
        with extra("serve", package, "the server"):
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(name=package)
    key = os.environ.get(KEY_VARIABLE)
    with _listening(host, port) as listener:
        import uvicorn
        import uvicorn.config

        from v2flow_cli.serve.app import create_app
        from v2flow_cli.serve.limits import Limits
        from v2flow_cli.serve.tasks import Models

        limits = Limits(
            max_batch=max_batch,
            max_waiting=max_waiting,
            max_body_bytes=round(max_body_mb * 1e6),
            max_pixels=round(max_megapixels * 1e6),
            max_side=max_side,
            max_seconds=timeout,
            url_seconds=60 * url_minutes,
        )
        app = create_app(Models.load(tokenizer, model, device, dtype), limits, key)

        class Server(uvicorn.Server):
            """SIGTERM and Ctrl-C end it after the last response, with exit code 0; a second signal ends it at once."""

            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, self.handle_exit)
                yield

            def handle_exit(self, sig: int, frame: Any) -> None:
                app.state.service.closing = True
                self.force_exit = self.should_exit
                self.should_exit = True

        logs: dict[str, Any] = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
        logs["handlers"]["access"]["stream"] = "ext://sys.stderr"  # stdout has only the address
        if host not in LOOPBACK and not key:
            log(f"warning: every client that reaches {host} can use this server; set {KEY_VARIABLE} to require a key")
        address = f"[{host}]" if ":" in host else host
        result(f"http://{address}:{listener.getsockname()[1]}")
        grace = round(limits.max_seconds) + 5
        config = uvicorn.Config(
            app, log_config=logs, timeout_graceful_shutdown=grace, server_header=False, date_header=True
        )
        Server(config).run(sockets=[listener])


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket bound to the address before the models are loaded.  Raises: V2FlowError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        # A name that cannot be resolved has a negative number; Python adds the address to the text of other failures.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise V2FlowError(f"--host {host} --port {port}: {reason}. Use another address.") from None
    with listener:
        yield listener


def main() -> None:
    """Entry point."""
    run(serve)


if __name__ == "__main__":
    main()
