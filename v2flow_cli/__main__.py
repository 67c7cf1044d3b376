"""``v2flow`` and ``python -m v2flow_cli``: the command line; Ctrl-C during its imports prints no traceback."""

import os
import signal
from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:
    """Ctrl-C before anything has begun, ``cli.endings`` included, which takes over: one word and exit code 130."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"interrupted\n")
    os._exit(130)


def main() -> None:
    """Entry point of the ``v2flow`` command."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGINT, _leave)
    from v2flow_cli.cli import endings

    endings.install()
    from v2flow_cli.cli import app, first_answer

    try:
        app.main()
    except SystemExit as end:
        first_answer.leave(end)
        raise


if __name__ == "__main__":
    main()
