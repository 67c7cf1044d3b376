"""Speed figures."""

import torch

from v2flow_cli.bench.codec_speed import _seconds, first_answer_seconds, help_seconds, peak_resident_bytes
from v2flow_cli.cli.bench_terminal import print_first_answers


def test_median_after_a_warm_up(monkeypatch) -> None:
    now = iter([0.0, 100.0, 200.0, 201.0, 300.0, 302.0, 400.0, 409.0])  # warm-up 100 s, then 1, 2 and 9 s
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    assert _seconds(lambda: None, torch.device("cpu"), repeats=3) == 2.0


def test_peak_memory_is_in_bytes() -> None:
    assert 50 * 2**20 < peak_resident_bytes() < 2**40  # Python with torch takes more than 50 MiB


def test_help_seconds() -> None:
    waits = help_seconds(["bench"], repeats=1)
    assert list(waits) == ["", "bench"] and all(0 < seconds < 60 for seconds in waits.values())


def test_first_answer_seconds_of_new_processes() -> None:
    waits = first_answer_seconds(["encode", "decode"], repeats=1)
    assert list(waits) == ["import torch", "encode", "decode"] and waits["encode"] > 0


def test_first_answers_are_printed_as_multiples_of_the_import_of_torch(capsys) -> None:
    print_first_answers({"import torch": 2.0, "encode": 3.0, "decode": 2.8})
    print_first_answers({})
    expected = "import torch 2.00 s, encode 3.00 s (1.5x), decode 2.80 s (1.4x)"
    assert capsys.readouterr().out == f"first answer: {expected}\n"
