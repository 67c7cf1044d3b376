"""What a Python program meets: lazy names, transformers' Auto classes, the image processor, and drawing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import v2flow_cli
from v2flow_cli import DrawingLM, V2FlowImageProcessor, V2FlowTokenizer
from v2flow_cli.errors import DataError, ModelError
from v2flow_cli.store.images import open_image


def python(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_heavy():
    heavy = "('torch', 'transformers', 'numpy', 'PIL', 'huggingface_hub')"
    assert python(f"import sys, v2flow_cli; print([m for m in {heavy} if m in sys.modules])") == "[]"
    assert {"DrawingLM", "V2FlowImageProcessor", "V2FlowTokenizer"} <= set(dir(v2flow_cli))
    with pytest.raises(AttributeError, match="no attribute 'V2FlowTokeniser'"):
        _ = v2flow_cli.V2FlowTokeniser


AUTO = """
import sys
{first}
from transformers import AutoConfig, AutoImageProcessor, AutoModel
{then}
folder = sys.argv[1]
model = AutoModel.from_pretrained(folder)
print(type(AutoConfig.from_pretrained(folder)).__name__, type(model).__name__, model.dtype,
      type(AutoImageProcessor.from_pretrained(folder)).__name__)
"""


@pytest.mark.parametrize(
    ("first", "then"),
    [("import v2flow_cli", ""), ("", "import v2flow_cli")],
    ids=["before", "after"],
)
def test_auto_classes_load_v2flow_after_its_import(first, then, tiny_tokenizer_folder):
    output = python(AUTO.format(first=first, then=then), tiny_tokenizer_folder)
    assert output == "V2FlowConfig V2FlowTokenizer torch.float32 V2FlowImageProcessor"


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "v2flow_cli", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"v2flow {v2flow_cli.__version__}")


@pytest.fixture
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)


def test_every_input_type_gives_the_same_pixels(photo):
    processor = V2FlowImageProcessor(size=32)
    expected = processor(Image.fromarray(photo), return_tensors="pt").pixel_values
    assert expected.shape == (1, 3, 32, 32) and expected.dtype == torch.float32
    assert -1 <= expected.min() < 0 < expected.max() <= 1
    first = torch.from_numpy(photo).permute(2, 0, 1)
    batch = torch.stack([first, first.flip(-1)])
    forms = {
        "list of PIL": [Image.fromarray(photo)],
        "array": photo,
        "array, channels first": first.numpy(),
        "float array": photo / 255,
        "list of arrays": [photo],
        "tensor": first,
        "float tensor": first / 255,
        "tensor, channels last": torch.from_numpy(photo),
        "bfloat16 would round; double": (first / 255).double(),
        "batch": batch[:1],
    }
    for name, form in forms.items():
        assert torch.equal(processor(form).pixel_values, expected), name
    mixed = processor([Image.fromarray(photo), photo, first]).pixel_values
    assert torch.equal(mixed, expected.expand(3, -1, -1, -1))
    assert processor(batch).pixel_values.shape == (2, 3, 32, 32)
    assert isinstance(processor(photo, return_tensors="np").pixel_values, np.ndarray)


def test_ambiguous_shapes_follow_convention_or_the_argument():
    processor, narrow = V2FlowImageProcessor(size=8), np.zeros((3, 8, 3), dtype=np.uint8)
    narrow[0] = 255  # the first row, or the red channel
    as_rows = processor(narrow).pixel_values
    as_channels = processor(narrow, input_data_format="channels_first").pixel_values
    assert as_rows[0, 0].std() > 0 and as_channels[0, 0].min() == 1 and as_channels[0, 1].max() == -1
    assert torch.equal(processor(torch.from_numpy(narrow)).pixel_values, as_channels)


def test_the_processor_gives_the_pixels_of_the_commands(tmp_path, photo):
    """Turned by EXIF, alpha over white, 16 bits: as ``open_image`` makes them."""
    turned, exif = Image.fromarray(photo), Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    alpha = np.dstack([photo, photo[:, :, :1]])
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    Image.fromarray(photo[:, :, 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    processor = V2FlowImageProcessor(size=32)
    for path in sorted(tmp_path.iterdir()):
        assert torch.equal(
            processor(Image.open(path)).pixel_values, processor(open_image(path, path.name)).pixel_values
        ), path.name
    assert torch.equal(processor(alpha).pixel_values, processor(Image.open(tmp_path / "alpha.png")).pixel_values)
    grey = processor(Image.open(tmp_path / "deep.png")).pixel_values
    assert torch.equal(grey, processor(photo[:, :, 0]).pixel_values)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("photo.jpg", "an image of type str; expected PIL images, arrays or tensors. Open a file with"),
        (7, "an image of type int"),
        ([], "no image: the list is empty"),
        (np.zeros((5, 4, 2), np.uint8), r"shape \(5, 4, 2\); expected 1, 3 or 4 channels"),
        (np.zeros((2, 2, 2, 2, 2), np.uint8), r"expected \(H, W\)"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\) has no pixels"),
        (np.full((4, 4, 3), -0.5), r"float pixels from -0.5 to -0.5; expected \[0, 1\]"),
        (np.full((4, 4, 3), np.nan), "float pixels from nan to nan"),
        (np.full((4, 4, 3), 300), r"pixels of type int64; expected uint8 in \[0, 255\]"),
        (np.zeros((4, 4, 3), bool), "pixels of type bool"),
    ],
)
def test_inputs_that_are_not_pictures_are_errors(images, message):
    with pytest.raises(DataError, match=message):
        V2FlowImageProcessor(size=8)(images)


def test_unknown_options_of_the_processor_are_named(photo):
    with pytest.raises(DataError, match="return_tensors is 'tf'; expected 'pt' or 'np'"):
        V2FlowImageProcessor(size=8)(photo, return_tensors="tf")
    with pytest.raises(DataError, match="do_resize: not an option of the v2flow image processor"):
        V2FlowImageProcessor(size=8)(photo, do_resize=False)


@pytest.fixture(scope="module")
def llm() -> DrawingLM:
    return DrawingLM.from_pretrained()


def test_prompts_to_token_ids_with_the_embedded_models(llm):
    token_ids = llm.generate("a red fox", seeds=3, temperature=0.0)
    digest = V2FlowTokenizer.from_pretrained().token_digest
    assert token_ids.shape == (1, 64) and token_ids.dtype == torch.int64 and llm.vocabulary.tokenizer_digest == digest
    assert 0 <= token_ids.min() and token_ids.max() < llm.vocabulary.codebook_size


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(prompts=[]), "0 prompts"),
        (dict(prompts=["a", "b"], seeds=[1]), "2 prompts, 1 seeds and 2 temperatures"),
        (dict(prompts="a", temperature=[1.0, 2.0]), "1 prompts, 1 seeds and 2 temperatures"),
        (dict(prompts="a", temperature=-1.0), r"temperature is -1.0; expected numbers from 0 up"),
        (dict(prompts="a", temperature=float("nan")), "temperature is nan"),
    ],
)
def test_arguments_of_generate_that_do_not_fit(llm, given, message):
    with pytest.raises(DataError, match=message):
        llm.generate(**given)


@pytest.mark.parametrize("load", [V2FlowTokenizer.from_pretrained, DrawingLM.from_pretrained])
def test_a_mistyped_path_is_an_error_at_once(load, tmp_path, monkeypatch, tiny_tokenizer_folder):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    Path("runs/tokenizer").mkdir(parents=True)
    Path("file").touch()
    with pytest.raises(ModelError, match=r"^runs/tokenzier: no such folder. Did you mean runs/tokenizer\?$"):
        load("runs/tokenzier")
    for name in ("./nothing", "/no/where", "runs/a/b", "a b", "../x"):
        with pytest.raises(ModelError, match="no such folder"):
            load(name)
    with pytest.raises(ModelError, match="file: a file; expected the folder of a model"):
        load("file")
