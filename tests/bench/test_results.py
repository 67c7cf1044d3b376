"""Results joined into one table, or refused."""

import copy
import json
from pathlib import Path

import pytest

from v2flow_cli.bench.results import as_record, join, tables
from v2flow_cli.bench.run import run_bench
from v2flow_cli.errors import DataError
from v2flow_cli.tokenizer import V2FlowTokenizer


@pytest.fixture(scope="module")
def record(tiny_tokenizer_folder: Path, sample_images) -> dict:
    tokenizer = V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder)
    photos = [("a", sample_images[0]), ("b", sample_images[1])]
    benches = [run_bench({"v2flow": tokenizer}, photos, size=s, with_codecs=False, with_speed=False) for s in (32, 64)]
    return as_record(tables(benches))


def write(file: Path, record: dict) -> Path:
    file.write_text(json.dumps(record))
    return file


def test_results_of_one_protocol_share_a_table_for_each_size(record: dict, tmp_path: Path) -> None:
    other = copy.deepcopy(record)
    for row in other["measured"]:
        row["psnr_db"] = 99.0
    other["protocols"][0]["seed"] = 7
    found, notes = join([write(tmp_path / "first.json", record), write(tmp_path / "second.json", other)])
    assert [table.size for table in found] == [32, 64]
    assert [row["system"] for row in found[0].rows] == [
        "v2flow",
        "autoencoder alone",
        "v2flow (second)",
        "autoencoder alone (second)",
    ]
    assert len(notes) == 1 and "differ in seed: 7 against 0" in notes[0]
    again, _ = join([tmp_path / "first.json", tmp_path / "first.json"])
    assert len(again[0].rows) == 2  # the same rows stand once


@pytest.mark.parametrize(
    ("key", "value"),
    [("count", 3), ("reference_digest", "0" * 16), ("crop", "none"), ("ssim", "x"), ("name", "v2flow-bench-1")],
)
def test_other_protocols_are_refused(record: dict, tmp_path: Path, key: str, value: object) -> None:
    other = copy.deepcopy(record)
    other["protocols"][0][key] = value
    files = [write(tmp_path / "first.json", record), write(tmp_path / "second.json", other)]
    with pytest.raises(DataError, match=rf"second.json and .*first.json cannot share a table.*{key}: {value} against"):
        join(files)


def test_lpips_is_compared_where_both_have_it(record: dict, tmp_path: Path) -> None:
    alex, vgg = copy.deepcopy(record), copy.deepcopy(record)
    alex["protocols"][0]["lpips"], vgg["protocols"][0]["lpips"] = "alex", "vgg"
    files = [write(tmp_path / f"{i}.json", r) for i, r in enumerate((record, alex, vgg))]
    assert join(files[:2])[0][0].protocol["lpips"] == "alex"
    with pytest.raises(DataError, match="lpips: vgg against alex"):
        join(files)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"protocols": [], "measured": [{"protocol": "x"}]}'])
def test_files_that_are_not_results_are_errors(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=r"x\.json: not a result of"):
        join([tmp_path / "x.json"])
    with pytest.raises(DataError, match=r"y\.json: cannot be read"):
        join([tmp_path / "y.json"])


def test_figures_of_a_feature_network_have_their_own_keys_and_plot(
    tiny_tokenizer_folder: Path, sample_images, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import save_file
    from torchvision.models import squeezenet1_1

    from v2flow_cli.bench.networks import MetricNetworks
    from v2flow_cli.bench.perceptual import Features
    from v2flow_cli.bench.report.plots import plots
    from v2flow_cli.bench.sweep import parse_sweeps

    torch.manual_seed(0)
    save_file(squeezenet1_1(weights=None).state_dict(), tmp_path / "features.safetensors")
    networks = MetricNetworks(features=Features(tmp_path / "features.safetensors"))
    tokenizer = V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder)
    photos = [(str(number), image) for number, image in enumerate(sample_images[:3])]
    options = {"with_codecs": False, "with_speed": False, "settings": parse_sweeps(["cfg=1,3"])}
    [table] = tables([run_bench({"m": tokenizer}, photos, size=32, networks=networks, **options)])
    first, second, autoencoder = table.rows
    assert table.protocol["features"].startswith("squeezenet1_1 features of features.safetensors, SHA-256")
    for row in (first, second, autoencoder):
        assert row["feature_distance"] > 0 and row["feature_distance_ci95"] > 0 and row["feature_frechet"] > 0
        assert row["lpips"] is row["rfid"] is None
    assert first["feature_distance"] != second["feature_distance"]
    page = "".join(drawing.svg for chart in plots(table) for drawing in chart.drawings)
    assert "Perception and distortion: feature distance over PSNR in dB" in page
    [small] = tables([run_bench({"m": tokenizer}, photos, size=16, networks=networks, **options)])
    assert small.rows[0]["feature_distance"] > 0 and small.rows[0]["feature_frechet"] > 0  # enlarged for the network


def test_results_of_other_feature_networks_are_refused(record: dict, tmp_path: Path) -> None:
    one, other = copy.deepcopy(record), copy.deepcopy(record)
    one["protocols"][0]["features"], other["protocols"][0]["features"] = "a", "b"
    del record["protocols"][0]["features"]  # written by an earlier version
    files = [write(tmp_path / f"{i}.json", r) for i, r in enumerate((record, one, other))]
    assert join(files[:2])[0][0].protocol["features"] == "a"
    with pytest.raises(DataError, match="features: b against a"):
        join(files)
