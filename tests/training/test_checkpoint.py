import pytest
import torch

from v2flow_cli.errors import ModelError
from v2flow_cli.training.checkpoint import list_checkpoints, load_newest, save_checkpoint


def save(root, step, keep=2):
    return save_checkpoint(root, step, {"model": {"w": torch.full((3,), float(step))}}, {"n": step}, keep)


def test_the_newest_is_loaded_and_old_ones_are_removed(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path / "c", step)
    assert [p.name for p in list_checkpoints(tmp_path / "c")] == ["step-00000002", "step-00000003"]
    folder, groups, state = load_newest(tmp_path / "c")
    assert folder.name == "step-00000003" and state == {"n": 3}
    assert torch.equal(groups["model"]["w"], torch.full((3,), 3.0))


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert load_newest(tmp_path) is None


@pytest.mark.parametrize("file", ["model.safetensors", "state.json"])
def test_a_flipped_bit_or_a_missing_file_is_detected(tmp_path, file):
    save(tmp_path, 1)
    newest = save(tmp_path, 2) / file
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    assert load_newest(tmp_path)[0].name == "step-00000001"
    newest.unlink()
    assert load_newest(tmp_path)[0].name == "step-00000001"


def test_all_damaged_is_an_error(tmp_path):
    (save(tmp_path, 1) / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="all 1 checkpoints are damaged"):
        load_newest(tmp_path)


def test_a_newer_format_is_refused(tmp_path):
    state = save(tmp_path, 1) / "state.json"
    state.write_text(state.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ModelError, match="written by a newer v2flow"):
        load_newest(tmp_path)


def test_an_unwritable_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="the checkpoint cannot be written"):
        save(tmp_path / "file", 1)
