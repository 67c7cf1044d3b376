"""Bars on a terminal, plain lines elsewhere."""

import io

import pytest

from v2flow_cli.cli import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture) -> None:
    with console.progress("encode", 20) as tick:
        for _ in range(20):
            tick()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "encode: 2/20" and lines[-1] == "encode: 20/20" and len(lines) == 10
    with console.steps_bar("train", 5) as at_step:
        at_step(1)
    assert capsys.readouterr().err == ""


def test_bars_with_rate_and_time_left_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with console.progress("encode", 3) as tick:
        tick(2)
    with console.steps_bar("train", 500) as at_step:
        at_step(400)  # resumed in the middle
        at_step(410)
    shown = terminal.getvalue()
    assert "encode" in shown and "2/3" in shown and "train" in shown and "410/500" in shown
    assert "/s" in shown and ":" in shown  # rate, and time left as h:mm:ss
