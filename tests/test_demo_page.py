"""The demo page: the full pipeline with a tiny tokenizer and a tiny LLM that draws its tokens."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from v2flow_cli.demo.page import demo
from v2flow_cli.errors import DataError
from v2flow_cli.store.token_file import load_token_ids
from v2flow_cli.store.token_manifest import TokenManifest


@pytest.fixture(scope="module")
def llm_folder(tiny_tokenizer_folder: Path, tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    from v2flow_cli.llm.vocabulary import VisualVocabulary, add_visual_tokens, extend_tables
    from v2flow_cli.tokenizer import V2FlowTokenizer
    from v2flow_cli.training.objectives.language_model import train_tokenizer

    torch.manual_seed(0)
    text_tokenizer = train_tokenizer(["a red fox runs", "two dogs on a beach"] * 3, 300)
    offset = len(text_tokenizer)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=offset, max_position_embeddings=128, **sizes))
    extend_tables(model, offset, 64, torch.randn(64, 16), seed=0)
    digest = V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder).token_digest
    model.config.v2flow = VisualVocabulary(offset, 64, offset + 64, offset + 65, 4, digest, (0,), (9,), 1).record()
    folder = tmp_path_factory.mktemp("llm")
    model.save_pretrained(folder)
    add_visual_tokens(text_tokenizer, offset, 64).save_pretrained(folder)
    return folder


@pytest.fixture
def run(tiny_tokenizer_folder: Path, llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def call(images: Path | None = None) -> Path:
        out = tmp_path / "demo"
        demo(out, images, "a red fox", 12, str(tiny_tokenizer_folder), str(llm_folder), device="cpu")
        return out

    return call


def test_a_page_of_the_sample_photos(run, capsys: pytest.CaptureFixture) -> None:
    out = run()
    manifest = TokenManifest.load(out / "tokens")
    assert manifest is not None and len(manifest.files) == 5
    assert load_token_ids(out / "tokens" / "coffee.npy", 64).shape == (4,)
    first, second = (np.asarray(Image.open(out / f"guidance-{g}" / "coffee.png")).astype(int) for g in (1, 3))
    assert first.shape == (32, 32, 3) and not np.array_equal(first, second)
    assert sorted(p.name for p in (out / "drawn").iterdir()) == [f"temperature-{t}.png" for t in (0.5, 0.9, 1.3)]
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count('<article class="photo">') == 5 and page.count("<figure>") == 3 and "a red fox" in page
    assert str((out / "index.html").resolve()) in capsys.readouterr().out
    run()  # a second time over the first one's files


def test_a_page_of_own_photos_with_bad_files(run, tmp_path: Path, sample_images, capsys) -> None:
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    sample_images[1].save(folder / "sub" / "cat.jpg")
    (folder / "broken.jpg").write_text("no")
    page = (run(folder) / "index.html").read_text(encoding="utf-8")
    assert page.count('<article class="photo">') == 1 and "sub/cat" in page
    assert "1 file left out" in page and "broken.jpg" in page
    assert "left out" in capsys.readouterr().err
    (folder / "sub" / "cat.jpg").unlink()
    with pytest.raises(DataError, match="none of the images could be read"):
        run(folder)
