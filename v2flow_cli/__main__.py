"""``v2flow`` and ``python -m v2flow_cli``: the command line; Ctrl-C during its imports prints no traceback."""

from v2flow_cli.cli import endings


def main() -> None:
    """Entry point of the ``v2flow`` command."""
    endings.install()
    from v2flow_cli.cli import app

    app.main()


if __name__ == "__main__":
    main()
