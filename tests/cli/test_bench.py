"""``v2flow bench`` through Typer's runner."""

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.tokenizer.test_seams import build
from v2flow_cli.cli.app import app


@pytest.fixture
def imgs(tmp_path: Path, sample_images) -> Path:
    folder = tmp_path / "imgs"
    folder.mkdir()
    for i, image in enumerate(sample_images[:3]):
        image.resize((64, 48)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def run(tiny_tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))  # no LPIPS weights there

    def invoke(*arguments: object, speed: bool = False):
        options = ["--model", str(tiny_tokenizer_folder), "--device", "cpu", "--dtype", "fp32"]
        options += [] if speed else ["--no-speed"]
        return CliRunner().invoke(app, ["bench", *map(str, arguments), *options])

    return invoke


def test_json_has_protocol_and_figures(run, imgs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("v2flow_cli.cli.bench_reconstruction.COMMANDS", ("bench",))  # all of them take 24 processes
    monkeypatch.setattr("v2flow_cli.cli.bench_reconstruction.FIRST_ANSWERS", ())
    done = run(imgs, "--json", speed=True)
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    [protocol] = found["protocols"]
    assert protocol["count"] == 3 and protocol["image_size"] == 32
    systems = [row["system"] for row in found["measured"]]
    assert systems == ["v2flow", "autoencoder alone", "JPEG", "WebP", "AVIF"]
    assert all(row["psnr_db"] is not None and row["lpips"] is None for row in found["measured"])
    row = found["measured"][0]
    assert row["codebook"]["tokens"] == 12 and row["codebook"]["codebook_size"] == 64
    assert row["encode_images_per_s"] > 0 and row["speed"]["batch_size"] == 8
    assert set(found["help_seconds"]) == {"", "bench"}
    assert set(found["first_answer_seconds"]) == {"import torch"}
    assert found["failed"] == []
    for i, left_out in enumerate(("LPIPS (alex)", "rFID (Inception v3)")):
        assert f"left out: {left_out}: its weights are not at" in found["notes"][i]
        assert f"left out: {left_out}" in done.stderr


def test_table_of_measured_and_published_rows(run, imgs: Path) -> None:
    done = run(imgs, "--res", 256, "--limit", 1, "--no-codecs")
    assert done.exit_code == 0, done.stderr
    assert "Measured on 1 images at 256 px" in done.stdout and "autoencoder alone" in done.stdout
    assert "Published, not measured here" in done.stdout and "Open-MAGVIT2" in done.stdout
    assert "codes used" in done.stdout and "JPEG" not in done.stdout
    assert "LPIPS" in done.stdout and "rFID" in done.stdout and "MS-SSIM" in done.stdout


def test_default_images_are_the_samples(run) -> None:
    found = json.loads(run("--json", "--no-codecs").stdout)
    assert found["protocols"][0]["count"] == 5


def test_guidance_scales_change_the_figures(run, imgs: Path) -> None:
    rows = json.loads(run(imgs, "--json", "--cfg", "1,3", "--no-codecs").stdout)["measured"]
    assert [row["system"] for row in rows[:2]] == ["v2flow, cfg 1", "v2flow, cfg 3"]
    assert [row["settings"]["guidance_scale"] for row in rows[:2]] == [1, 3]
    assert rows[0]["psnr_db"] != rows[1]["psnr_db"]


def test_sampling_options_change_the_figures(run, imgs: Path) -> None:
    def psnr(*options: object) -> float:
        done = run(imgs, "--json", "--no-codecs", *options)
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)["measured"][0]["psnr_db"]

    plain = psnr("--noise", 1)
    assert psnr("--noise", 1) == plain
    for options in (["--seed", 1], ["--steps", 7], ["--rounds", 3], ["--solver", "heun"]):
        assert psnr("--noise", 1, *options) != plain
    assert psnr("--noise", 0) != plain
    guided = ("--noise", 1, "--cfg", 3, "--rounds", 4, "--schedule")
    assert psnr(*guided, "linear") != psnr(*guided, "constant")


def test_a_product_of_sweeps_at_two_sizes(run, imgs: Path) -> None:
    sweeps = ("--sweep", "cfg=1,2", "--sweep", "solver=euler,heun")
    done = run(imgs, "--json", "--res", "32,64", *sweeps, "--steps", 3, "--no-codecs")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert [p["image_size"] for p in found["protocols"]] == [32, 64]
    rows = [row for row in found["measured"] if row["kind"] == "tokenizer"]
    names = [f"v2flow, cfg {c}, solver {s}" for c in (1, 2) for s in ("euler", "heun")]
    assert [row["system"] for row in rows] == names * 2
    assert [row["tokens_per_image"] for row in rows] == [4] * 4 + [16] * 4
    assert all(row["settings"]["num_flow_steps"] == 3 for row in rows)
    assert len({row["psnr_db"] for row in rows}) == 8


def test_several_models_and_an_external_one(run, imgs: Path, tiny_tokenizer_folder, tmp_path: Path) -> None:
    code = """
import torch
class White:
    codebook_size = 2
    def encode(self, images): return torch.ones(len(images), 1)
    def decode(self, ids): return torch.ones(len(ids), 3, 32, 32)
"""
    (tmp_path / "white.py").write_text(code)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_tokenizer_folder, copy)
    done = run(imgs, "--model", copy, "--external", f"{tmp_path}/white.py:White", "--json", "--no-codecs")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)["measured"]
    assert [(row["system"], row["kind"]) for row in found] == [
        ("copy", "tokenizer"),
        ("tokenizer", "tokenizer"),
        ("White", "external"),
        ("autoencoder alone", "autoencoder"),
    ]
    assert found[0]["psnr_db"] == found[1]["psnr_db"] != found[2]["psnr_db"]


def test_saved_results_join_or_are_refused(run, imgs: Path, tmp_path: Path) -> None:
    for name, options in (("a", ["--cfg", 1]), ("b", ["--cfg", 2]), ("c", ["--limit", 2])):
        (tmp_path / f"{name}.json").write_text(run(imgs, "--json", "--no-codecs", *options).stdout)
    page = tmp_path / "page.html"
    files = {name: [str(tmp_path / f"{name}.json")] for name in "abc"}
    done = CliRunner().invoke(app, ["bench", "join", *files["a"], *files["b"], "--report", str(page)])
    assert done.exit_code == 0, done.stderr
    assert "v2flow (b)" in done.stdout and "Measured on 3 images at 32 px" in done.stdout
    assert "v2flow (b)" in page.read_text(encoding="utf-8")
    done = CliRunner().invoke(app, ["bench", "join", *files["a"], *files["c"]])
    assert done.exit_code == 1 and done.stdout == ""
    assert "cannot share a table" in done.stderr and "count: 2 against 3" in done.stderr


def test_report_and_csv(run, imgs: Path, tmp_path: Path) -> None:
    page, table, single = tmp_path / "out" / "page.html", tmp_path / "table.csv", tmp_path / "images.csv"
    done = run(imgs, "--report", page, "--csv", table, "--images-csv", single, "--report-images", 2)
    assert done.exit_code == 0, done.stderr
    assert all(f"wrote {file}" in done.stdout for file in (page, table, single))
    text = page.read_text(encoding="utf-8")
    assert text.count('<article class="photo">') == 2 and "The first 2 of 3 photos" in text
    assert len(table.read_text().splitlines()) == 1 + 5
    assert len(single.read_text().splitlines()) == 1 + 3 * 5
    assert sorted(p.name for p in page.parent.iterdir()) == ["page.html"]


def test_bad_images_are_listed_and_the_rest_measured(run, imgs: Path, tmp_path: Path) -> None:
    (imgs / "text.jpg").write_text("not a picture")
    (imgs / "cut.png").write_bytes((imgs / "0.png").read_bytes()[:500])
    page = tmp_path / "page.html"
    done = run(imgs, "--json", "--report", page)
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["protocols"][0]["count"] == 3
    assert {Path(f["source"]).name for f in found["failed"]} == {"text.jpg", "cut.png"}
    assert "left out" in done.stderr and "2 of the images could not be measured" in done.stderr
    assert "2 files left out" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing/"], 1, "no such file or folder"),
        (["imgs", "--res", 33], 1, "--res 33"),
        (["imgs", "--cfg", "high"], 2, "expected different numbers"),
        (["imgs", "--cfg", "2,2"], 2, "expected different numbers"),
        (["imgs", "--res", "32,big"], 2, "expected different numbers from 16 on"),
        (["imgs", "--sweep", "size=3"], 2, "expected KEY=V1,V2"),
        (["imgs", "--sweep", "cfg=1,2", "--cfg", 3], 2, "set twice"),
        (["imgs", "--sweep", "tokens=4,16"], 1, "v2flow always has 4). Use one --model for each length"),
        (["imgs", "--lpips-net", "vgg"], 1, "LPIPS (vgg): its weights are not at"),
        (["imgs", "--fid"], 1, "rFID (Inception v3): its weights are not at"),
        (["imgs", "--external", "nowhere"], 1, "expected MODULE:FACTORY"),
        (["imgs", "--solver", "magic"], 2, "magic"),
        (["imgs", "--report-images", 3], 2, "does nothing without --report"),
        (["imgs", "--codec-bytes", "99", "--no-codecs"], 2, "does nothing without --codecs"),
        (["--llm", "imgs", "--sweep", "cfg=1,2"], 2, "No such option: --sweep"),
        (["llm", "imgs", "--csv", "t.csv"], 2, "No such option: --csv"),
        (["--alignment", "imgs", "--batch-size", 2], 2, "No such option: --batch-size"),
        (["--alignment", "--llm", "imgs"], 2, "one mode at a time"),
        (["imgs", "--report", "imgs/0.png/page.html"], 1, "cannot be written"),
        (["imgs", "--device", "cuda:99"], 1, "not available"),
    ],
)
def test_bad_requests(
    run, imgs: Path, monkeypatch: pytest.MonkeyPatch, arguments: list, code: int, message: str
) -> None:
    monkeypatch.chdir(imgs.parent)
    done = run(*arguments) if "--device" not in arguments else CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == code
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" or "--report" in arguments


def test_a_folder_of_bad_images_only(run, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_text("x")
    done = run(tmp_path)
    assert done.exit_code == 1 and "No image could be read" in done.stderr


def test_a_100_megapixel_image_is_refused_before_decoding(run, imgs: Path) -> None:
    Image.new("1", (10_000, 10_000)).save(imgs / "huge.png")
    done = run(imgs, "--json", "--no-codecs")
    assert done.exit_code == 1
    assert "100,000,000 pixels" in json.loads(done.stdout)["failed"][0]["reason"]


def test_modes_by_name_and_as_options(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    recipe = tmp_path / "missing.yaml"
    for arguments, message in (
        (["join", tmp_path / "x.json"], "not a result of"),
        (["--join", tmp_path / "x.json"], "not a result of"),
        (["cost", recipe], "no such recipe"),
        (["--speed", recipe], "no such recipe"),
        ([recipe], "no such recipe"),
        (["llm", tmp_path / "none"], "no such file"),
        (["--llm", tmp_path / "none"], "no such file"),
        (["llm", tmp_path, "--model", "a", "--model", "b"], "an LLM draws the tokens of one"),
    ):
        done = CliRunner().invoke(app, ["bench", *map(str, arguments)])
        assert done.exit_code in (1, 2) and message in done.stderr, (arguments, done.stderr)


def test_a_curve_over_lengths_with_intervals(imgs: Path, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "flexible")
    page = tmp_path / "page.html"
    common = ["bench", str(imgs), "--model", str(tmp_path / "flexible"), "--device", "cpu", "--no-codecs", "--no-speed"]
    done = CliRunner().invoke(app, [*common, "--sweep", "tokens=1,2,6", "--report", str(page)])
    assert done.exit_code == 0, done.output
    curve = done.stdout[done.stdout.index("PSNR by length") :].splitlines()[2:6]
    rows = [re.fullmatch(r" *(\d) +([\d.]+) ± ([\d.]+) +([+-][\d.]+)? +(-*o-*)", line) for line in curve[1:]]
    assert curve[0].split()[:4] == ["tokens", "PSNR", "dB", "gain"] and all(rows), curve
    assert [row[1] for row in rows] == ["1", "2", "6"]
    gains = [float(after[2]) - float(before[2]) for before, after in itertools.pairwise(rows)]
    assert [float(row[4]) for row in rows[1:]] == pytest.approx(gains, abs=0.011)
    text = page.read_text()
    drawing = text[text.index("Length and quality: PSNR over tokens an image") :].split("</svg>")[0]
    assert drawing.count('class="interval') == drawing.count("<circle") == 3
    assert [f">{count}</text>" in drawing for count in (1, 2, 6)] == [True] * 3 and "<polyline" in drawing
    one = CliRunner().invoke(app, [*common, "--report", str(page), "--sweep", "cfg=1,2"])
    assert one.exit_code == 0 and "PSNR by length" not in one.stdout  # two settings of one length are no curve
    assert "Length and quality" not in page.read_text()


NOT_FIGURES = r"^(v2flow, cfg \d|system.*|-+)"


@pytest.mark.parametrize("columns", [40, 80])
def test_narrow_terminals_keep_names_and_whole_figures(run, imgs: Path, monkeypatch, columns: int) -> None:
    """The system's name beside every figure, and no figure cut (a table of one width would need 150 columns)."""
    monkeypatch.setenv("COLUMNS", "500")
    wide = run(imgs, "--no-codecs", "--sweep", "cfg=1,2").stdout
    monkeypatch.setenv("COLUMNS", str(columns))
    narrow = run(imgs, "--no-codecs", "--sweep", "cfg=1,2").stdout
    heads, figures = {}, {}
    for name, text in (("wide", wide), ("narrow", narrow)):
        table = text[text.index("system") : text.index("v2flow, cfg 1: ")]
        figures[name] = re.findall(r"\d[\d.,]*(?: ± [\d.]+)?", re.sub(NOT_FIGURES, "", table, flags=re.M))
        heads[name] = table.count("v2flow, cfg 1 ")
        assert name == "wide" or max(map(len, table.splitlines())) <= columns
    assert sorted(figures["narrow"]) == sorted(figures["wide"]) and len(figures["wide"]) > 10
    assert heads["narrow"] > heads["wide"] == 1
