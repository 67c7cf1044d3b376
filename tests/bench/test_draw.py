"""``bench draw``: figures with their intervals, copies, and the command from prompts to the sheet."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import squeezenet1_1
from typer.testing import CliRunner

from tests.bench.drawings import SHAPES, write_tar
from tests.bench.test_judge import judge, references, space  # noqa: F401  fixtures
from tests.test_demo_page import llm_folder  # noqa: F401  a fixture
from v2flow_cli.bench.draw import measure_copies, reconstruct, share_of, summarise
from v2flow_cli.bench.judge import Judge, Verdict
from v2flow_cli.bench.prompts import Thing, prompt_for
from v2flow_cli.cli.app import app


def test_shares_have_wilsons_interval():
    share = share_of([True] * 8 + [False] * 2)
    assert (share.share, share.trials) == (0.8, 10)
    assert (share.low, share.high) == (pytest.approx(0.4902, abs=1e-3), pytest.approx(0.9433, abs=1e-3))
    assert share_of([True] * 5).high == 1.0 and share_of([False] * 5).low == 0.0
    fewer = share_of([True, True, True, False], trials=2)  # pictures of two prompts
    assert fewer.low < share_of([True, True, True, False]).low and fewer.share == 0.75
    with pytest.raises(ValueError, match="no trials"):
        share_of([])


def test_each_kind_has_its_own_figures_and_prompts_are_the_trials():
    def verdict(**right):
        return Verdict(((0,),), "red", 1, {**right, "all": all(right.values())}, 0.1)

    fox, red = prompt_for("object", [Thing("fox")]), prompt_for("colour", [Thing("fox", "red")])
    drawn = [(fox, verdict(noun=True)), (fox, verdict(noun=False)), (red, verdict(noun=True, colour=False))]
    real = [(fox, verdict(noun=True)), (red, verdict(noun=True, colour=True))]
    of_object, of_colour = summarise(drawn, real, real)
    assert (of_object.kind, of_object.prompts, of_object.pictures) == ("object", 1, 2)
    assert (of_object.drawn["noun"].share, of_object.drawn["noun"].trials) == (0.5, 1)
    assert set(of_colour.drawn) == {"all", "noun", "colour"} and of_colour.drawn["all"].share == 0
    assert of_colour.real["all"].share == of_colour.real_tokens["all"].share == 1


def test_copied_pictures_are_detected(space, references):  # noqa: F811
    kept = [r for r in references if not r.key.endswith("-0")]
    unseen = [r.pixels() for r in references if r.key.endswith("-0")]
    training = Judge(space, kept)
    blurred = lambda pictures: [np.asarray(Image.fromarray(p).resize((64, 64))) for p in pictures]  # noqa: E731
    copied = measure_copies(training, training, [r.pixels() for r in kept[:10]], unseen, blurred)
    assert copied.drawn.median == pytest.approx(0, abs=1e-5) and copied.held_out.median > 1e-4
    assert copied.nearer.share == 1.0 and copied.copies.median > 0
    fresh = measure_copies(training, training, blurred(unseen), unseen, blurred)
    assert fresh.nearer.share < 0.2 and fresh.drawn == fresh.held_out_tokens


def test_reconstructions_of_a_wide_picture_are_not_cropped(tiny_tokenizer):
    wide = np.zeros((20, 60, 3), np.uint8)
    seen = []
    encode = tiny_tokenizer.encode
    tiny_tokenizer.encode = lambda images, *args, **options: seen.append(images) or encode(images, *args, **options)
    [back] = reconstruct(tiny_tokenizer, [wide], 4)
    assert back.shape == (32, 32, 3) and back.dtype == np.uint8
    assert (seen[0][0, 0, 16] < -0.9).all() and (seen[0][0, 0, [0, -1]] == 1).all()


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_tokenizer_folder, llm_folder):  # noqa: F811
    folder = tmp_path_factory.mktemp("draw")
    write_tar(folder / "drawings.tar")
    write_tar(folder / "held.tar", hands=1, first=3)
    torch.manual_seed(0)
    save_file(squeezenet1_1(weights=None).state_dict(), folder / "features.safetensors")
    models = ["--model", str(tiny_tokenizer_folder), "--llm-model", str(llm_folder), "--device", "cpu"]
    options = ["--features", str(folder / "features.safetensors"), *models, "--dtype", "fp32"]

    def run(*args):
        held = [] if "--held-out" in args else ["--held-out", str(folder / "held.tar")]
        words = ["bench", "draw", str(folder / "drawings.tar"), *options, *held, *map(str, args)]
        return CliRunner().invoke(app, words)

    return run


def test_the_command_draws_judges_and_writes_a_sheet(world, tmp_path):
    found = world("--per-kind", 2, "-o", tmp_path / "drawn", "--report", tmp_path / "sheet.html", "--json", "-n", 2)
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)
    kinds = {figures["kind"]: figures for figures in record["kinds"]}
    assert list(kinds) == ["object", "colour", "count", "relation"]
    assert kinds["object"]["prompts"] == 2 and kinds["object"]["pictures"] == 4
    for figures in kinds.values():
        assert figures["real"]["all"]["trials"] > 0 and 0 <= figures["real"]["all"]["share"] <= 1
        assert set(figures["real_tokens"]) == set(figures["real"]) == set(figures["drawn"])
    assert len(record["pictures"]) == 2 * sum(figures["prompts"] for figures in kinds.values())
    for picture in record["pictures"]:
        with Image.open(picture["path"]) as image:
            assert image.size == (32, 32) and image.text["v2flow:prompt"] == picture["prompt"]
        assert set(picture["seen"]) <= set(SHAPES) and picture["right"]
    assert record["copies"]["held_out"]["count"] > 0
    page = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == len(record["pictures"]) and "http" not in page.replace("http-equiv", "")
    assert "the judge, on real pictures" in page and "Copies" in page
    again = world("--per-kind", 2, "-o", tmp_path / "drawn")
    assert again.exit_code == 1 and "exists already" in again.stderr


def test_prompts_of_a_file_and_prompts_without_a_known_thing(world, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red disc\n<b>unicorn</b>\n")
    found = world("--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "d", "--report", tmp_path / "sheet.html")
    assert found.exit_code == 0, found.output
    assert "colour: 1 prompts, 1 pictures drawn" in found.stdout and "wrote 2 pictures" in found.stdout
    assert "1 pictures are not checked" in found.stderr
    page = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;unicorn" in page and "<b>unicorn" not in page


def test_held_out_and_training_pictures_of_other_files(world, tmp_path):
    write_tar(tmp_path / "train.tar", hands=2, captions=True)
    write_tar(tmp_path / "held.tar", hands=1)
    more = ("--held-out", tmp_path / "held.tar", "--train", tmp_path / "train.tar", "--per-kind", 1)
    found = world(*more, "-o", tmp_path / "d", "--json")
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)
    assert "24 pictures of 3 things; 12 held out" in record["references"]  # 36 less the 12 that are held out
    assert record["copies"]["held_out"]["count"] == 12 and record["copies"]["held_out"]["median"] == pytest.approx(
        0, abs=1e-5
    )


def test_missing_inputs_are_errors(world, tmp_path):
    found = world("--held-out", tmp_path / "none.tar")
    assert found.exit_code == 1 and "no such file or folder" in found.stderr
    found = world("--tokens", 3, "-o", tmp_path / "short")
    assert found.exit_code == 1 and "3 tokens, but" in found.stderr and "always draws 4" in found.stderr
    assert not (tmp_path / "short").exists()
    (tmp_path / "prompts.txt").write_text("\n")
    found = world("--prompts", tmp_path / "prompts.txt")
    assert found.exit_code == 1 and "no prompt in it" in found.stderr
