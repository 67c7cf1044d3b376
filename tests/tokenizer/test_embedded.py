import json

import pytest
import torch
from safetensors import safe_open

from v2flow_cli.errors import ModelError
from v2flow_cli.tokenizer import V2FlowTokenizer, embedded
from v2flow_cli.tokenizer.embedded import share_autoencoder, tokenizer_folder
from v2flow_cli.tokenizer.latents import load_autoencoder_spec


@pytest.fixture
def shared(tiny_tokenizer_folder, tmp_path, monkeypatch):
    """A tokenizer whose folder does not have the autoencoder, which is that of the embedded one."""
    V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "whole")
    monkeypatch.setattr(embedded, "EMBEDDED_MODEL", tmp_path / "whole")
    share_autoencoder(tmp_path / "whole", tmp_path / "shared")
    return tmp_path / "shared"


def test_a_shared_autoencoder_is_not_stored_twice(shared, tmp_path):
    with safe_open(shared / "model.safetensors", "pt") as file:
        assert not any(name.startswith("latents.") for name in file.keys())
    whole, model = (V2FlowTokenizer.from_pretrained(folder) for folder in (tmp_path / "whole", shared))
    assert (model.digest, model.token_digest) == (whole.digest, whole.token_digest)
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.equal(model.encode(image), whole.encode(image))
    spec, weights = load_autoencoder_spec(str(shared))
    assert spec == whole.config.autoencoder and weights.keys() == whole.latents.autoencoder.state_dict().keys()


def test_its_sampling_may_differ_from_the_training_s(shared, tmp_path):
    share_autoencoder(tmp_path / "whole", tmp_path / "other", num_flow_steps=7)
    whole, model = (V2FlowTokenizer.from_pretrained(tmp_path / name) for name in ("whole", "other"))
    assert model.config.sampling == {**whole.config.sampling, "num_flow_steps": 7}
    assert model.token_digest == whole.token_digest


def test_a_copy_of_it_is_complete(shared, tmp_path, monkeypatch):
    model = V2FlowTokenizer.from_pretrained(shared)
    model.save_pretrained(tmp_path / "copy")
    assert embedded.SHARED not in json.loads((tmp_path / "copy" / "config.json").read_text())
    monkeypatch.setattr(embedded, "EMBEDDED_MODEL", tmp_path / "nothing")
    assert V2FlowTokenizer.from_pretrained(tmp_path / "copy").digest == model.digest


def test_another_autoencoder_is_refused(shared, tiny_tokenizer_folder, tmp_path, monkeypatch):
    other = V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder)
    with torch.no_grad():
        next(other.latents.parameters()).add_(1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="that of the embedded model is"):
        share_autoencoder(tmp_path / "other", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(embedded, "EMBEDDED_MODEL", tmp_path / "other")
    with pytest.raises(ModelError, match=r"shared: trained on the autoencoder \w{16}, but that of the embedded model"):
        V2FlowTokenizer.from_pretrained(shared)


def test_names_of_embedded_tokenizers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tokenizer_folder(None) == tokenizer_folder("default") == embedded.EMBEDDED_MODEL
    assert tokenizer_folder("flexible") == embedded.FLEXIBLE_MODEL
    (tmp_path / "flexible").mkdir()
    assert tokenizer_folder("flexible").resolve() == tmp_path / "flexible"


def test_the_flexible_tokenizer_takes_any_length():
    model = V2FlowTokenizer.from_pretrained("flexible")
    assert model.flexible and model.max_tokens == 256
    photo = torch.rand(1, 3, 256, 256) * 2 - 1
    ids = model.encode(photo)
    assert ids.shape == (1, 256) and torch.equal(model.encode(photo, 5, refine_steps=0), ids[:, :5])
    pictures = model.decode(ids.expand(2, -1), lengths=[1, 256])
    assert pictures.shape == (2, 3, 256, 256) and not torch.equal(pictures[0], pictures[1])
