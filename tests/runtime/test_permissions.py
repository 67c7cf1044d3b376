import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from v2flow_cli.runtime.permissions import set_default_mode


@pytest.fixture
def others_read():
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_weights_get_the_mode_of_any_new_file(tmp_path, others_read):
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").chmod(0o600)  # as safetensors 0.8 leaves it
    set_default_mode(tmp_path / "a.safetensors")
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o644
    assert os.listdir(tmp_path) == ["a.safetensors"]
    os.umask(0o077)
    set_default_mode(tmp_path / "a.safetensors")
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o600


def test_a_saved_tokenizer_can_be_read_by_others(tiny_tokenizer, tmp_path, others_read):
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()} == {0o644}
