"""Speed figures."""

from dataclasses import replace

import torch

from tests.tokenizer.test_seams import build
from v2flow_cli.bench.codec_speed import (
    _seconds,
    first_answer_seconds,
    help_seconds,
    measure_speeds,
    peak_resident_bytes,
)
from v2flow_cli.bench.coder import v2flow_coder
from v2flow_cli.bench.sweep import parse_sweeps
from v2flow_cli.cli.bench_terminal import print_first_answers


def test_median_after_a_warm_up(monkeypatch) -> None:
    now = iter([0.0, 100.0, 200.0, 201.0, 300.0, 302.0, 400.0, 409.0])  # warm-up 100 s, then 1, 2 and 9 s
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    assert _seconds(lambda: None, torch.device("cpu"), repeats=3) == 2.0


def test_each_source_of_ids_is_timed_and_decoded_with_its_own(monkeypatch) -> None:
    flexible = build()
    widths: list[int] = []
    decode = flexible.decode
    monkeypatch.setattr(
        flexible, "decode", lambda ids, **options: widths.append(ids.shape[1]) or decode(ids, **options)
    )
    coders = [v2flow_coder("m", flexible, setting) for setting in parse_sweeps(["tokens=1,6", "refine=0,2"])]
    encoded: list[str] = []
    for i, coder in enumerate(coders):
        first = coder.encode
        coders[i] = replace(coder, encode=lambda images, e=first, s=coder.source: encoded.append(s) or e(images))
    speeds = measure_speeds(coders, torch.rand(1, 3, 32, 32) * 2 - 1, repeats=1)
    assert list(speeds) == [coder.name for coder in coders]
    assert set(encoded) == {"m", "m at 1 tokens, 2 steps", "m at 6 tokens, 2 steps"}
    assert len(encoded) == 3 * 3  # a warm-up, a measurement and the ids to decode; unrefined ids are shared
    assert widths == [1, 1, 1, 1, 6, 6, 6, 6]


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
