"""Tokenizers that are not ours, through the documented protocol."""

from pathlib import Path

import pytest
import torch

from v2flow_cli.bench.coder import load_external
from v2flow_cli.bench.results import as_record, tables
from v2flow_cli.bench.run import run_bench
from v2flow_cli.errors import ModelError

GOOD = """
import torch

class Grey:
    \"\"\"One token a quarter of the picture: its mean grey in 16 levels.\"\"\"
    name, codebook_size, weights_digest = "grey", 16, "abc"

    def encode(self, images):
        means = torch.nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 2)
        return ((means.flatten(1) + 1) * 7.5).round().long()

    def decode(self, ids):
        grey = ids.view(-1, 1, 2, 2) / 7.5 - 1.0
        return torch.nn.functional.interpolate(grey, size=SIZE).expand(-1, 3, -1, -1)

SIZE = 32

class Far(Grey):
    def encode(self, images):
        return super().encode(images) + 16

class Small(Grey):
    def decode(self, ids):
        return super().decode(ids)[..., :8]

class Half:
    codebook_size = 16
    def encode(self, images): ...

def broken():
    raise RuntimeError("no weights here")
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    file = tmp_path / "my_tokenizers.py"
    file.write_text(GOOD)
    return file


def test_an_external_tokenizer_is_measured(
    module: Path, sample_images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = [("a", sample_images[0]), ("b", sample_images[1])]
    bench = run_bench({}, photos, size=32, externals=[load_external(f"{module}:Grey")], with_codecs=False)
    [row] = as_record(tables([bench]))["measured"]
    assert (row["system"], row["kind"], row["weights_digest"], row["tokens_per_image"]) == (
        "grey",
        "external",
        "abc",
        4,
    )
    assert row["bytes_per_image"] == 2 and row["codebook"]["codebook_size"] == 16 and row["decode_images_per_s"] > 0
    assert 5 < row["psnr_db"] < 25
    monkeypatch.chdir(tmp_path)
    again = load_external("my_tokenizers:Grey")  # as a module of the current folder
    assert torch.equal(again.encode(torch.zeros(1, 3, 32, 32)), torch.tensor([[8, 8, 8, 8]]))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Half", "Half has no decode; expected encode"),
        ("broken", "RuntimeError: no weights here"),
        ("Missing", "AttributeError"),
    ],
)
def test_tokenizers_that_do_not_follow_the_protocol(module: Path, factory: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_external(f"{module}:{factory}")


def test_invalid_factories(tmp_path: Path) -> None:
    for place in ("module", ":factory", "module:"):
        with pytest.raises(ModelError, match="expected MODULE:FACTORY"):
            load_external(place)
    with pytest.raises(ModelError, match="ModuleNotFoundError"):
        load_external("no_such_module_anywhere:make")
    with pytest.raises(ModelError, match="FileNotFoundError"):
        load_external(f"{tmp_path}/no.py:make")


def test_wrong_ids_and_pictures_are_named(module: Path) -> None:
    images = torch.zeros(2, 3, 32, 32)
    with pytest.raises(ModelError, match=r"encode returned shape \(2, 4\) with values 24 to 24 .*\[0, 16\)"):
        load_external(f"{module}:Far").encode(images)
    coder = load_external(f"{module}:Small")
    with pytest.raises(ModelError, match=r"decode returned shape \(2, 3, 32, 8\).*\(2, 3, 32, 32\)"):
        coder.decode(coder.encode(images), [0, 1], (32, 32))
