import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from v2flow_cli.bench.alignment import align, energy_distance
from v2flow_cli.cli.app import app
from v2flow_cli.tokenizer import V2FlowTokenizer

from ..conftest import build_tiny_tokenizer


def test_energy_distance_of_equal_far_and_shifted_samples():
    torch.manual_seed(0)
    same = energy_distance(torch.randn(800, 8), torch.randn(800, 8))
    shifted = energy_distance(torch.randn(800, 8), torch.randn(800, 8) + 0.5)
    far = energy_distance(torch.randn(800, 8), torch.randn(800, 8) + 1000)
    assert abs(same) < 0.005 < shifted < 0.2 and far > 0.99


def test_words_align_with_themselves_and_scaled_words_do_not():
    torch.manual_seed(0)
    words = torch.randn(600, 12) + 2
    found = align("words", True, words[:300], words, seed=0)
    assert found.norm_ratio == pytest.approx(1, abs=0.05) and found.nearest_word_cosine == pytest.approx(1, abs=1e-5)
    assert abs(found.energy_distance) < 0.01 and found.word_nearest_cosine < 1
    assert found.tokens_plane.shape == (300, 2) and found.words_plane.shape == (600, 2)
    far = align("far", False, -3 * words[:300], words, seed=0)
    assert far.norm_ratio == pytest.approx(3, rel=0.05) and far.nearest_word_cosine < 0
    assert far.energy_distance > 0.5


def test_command_draws_a_panel_for_each_tokenizer(tiny_tokenizer_folder, tmp_path):
    other = build_tiny_tokenizer()
    other.vocabulary.set_table(torch.randn(300, 32))
    other.save_pretrained(tmp_path / "other")
    arguments = ["bench", "--alignment", "--model", str(tiny_tokenizer_folder), "--limit", "2"]
    plot = tmp_path / "plane.png"
    ran = CliRunner().invoke(app, [*arguments, "--model", str(tmp_path / "other"), "--plot", str(plot), "--json"])
    assert ran.exit_code == 0, ran.output
    record = json.loads(ran.stdout)
    assert [one["name"] for one in record["alignments"]] == [str(tiny_tokenizer_folder), str(tmp_path / "other")]
    assert record["words"] == 300 and all(one["tokens"] > 0 for one in record["alignments"])
    assert record["alignments"][1]["norm_ratio"] > 5 * record["alignments"][0]["norm_ratio"]
    assert Image.open(plot).size[0] > 2 * 480
    plain = CliRunner().invoke(app, arguments)
    assert "norm ratio" in plain.stdout and "energy distance" in plain.stdout


def test_a_tokenizer_without_vocabulary_has_no_words(tiny_tokenizer_folder, tmp_path):
    model = V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder)
    model.config.vocabulary = {**model.config.vocabulary, "llm": "none"}
    bare = V2FlowTokenizer(model.config)
    bare.save_pretrained(tmp_path / "bare")
    ran = CliRunner().invoke(app, ["bench", "--alignment", "--model", str(tmp_path / "bare")])
    assert ran.exit_code == 1 and "has no vocabulary" in ran.stderr
