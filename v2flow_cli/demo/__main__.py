"""``python -m v2flow_cli.demo``: runs the live demo on this machine until Ctrl-C."""

from __future__ import annotations

import importlib
import os
from typing import Annotated

import typer

from v2flow_cli.cli import options
from v2flow_cli.cli.console import result
from v2flow_cli.cli.entry import run
from v2flow_cli.errors import V2FlowError
from v2flow_cli.runtime.extras import extra


def demo(
    model: options.Tokenizer = None,
    llm: options.Llm = None,
    decoder: options.Decoder = None,
    device: options.Device = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 accepts other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
) -> None:
    """Encode and decode photos, and draw pictures from prompts, in a browser."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    with extra("demo", "gradio", "the live demo (`make demo` makes a page without it)"):
        importlib.import_module("gradio")

    from v2flow_cli.demo.app import build_app
    from v2flow_cli.demo.studio import Studio

    app = build_app(Studio(model, llm, device, decoder))
    try:
        app.launch(server_name=host, server_port=port, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise V2FlowError(f"--host {host} --port {port}: {error} Use another --port.") from None
    result(f"http://{host}:{port}")
    app.block_thread()


def main() -> None:
    """Entry point."""
    run(demo)


if __name__ == "__main__":
    main()
