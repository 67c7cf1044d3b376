"""LPIPS, rFID and where their weights come from. The networks have random weights: the wiring is tested."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from tests.bench.test_metrics import batch
from v2flow_cli.bench.perceptual import FrechetDistance, Inception, Lpips
from v2flow_cli.errors import ModelError
from v2flow_cli.store import network_weights as weights
from v2flow_cli.store.network_weights import JudgeWeights, weights_url


@pytest.fixture
def torch_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("TORCH_HUB", raising=False)
    return tmp_path / "torch"


def put(name: str, state: dict, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random weights under the published name; their hash is taken for the published one."""
    file = folder / weights_url(name).rsplit("/", 1)[-1]
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    expected = file.stem.rsplit("-", 1)[-1]
    monkeypatch.setattr(weights, "sha256_of", lambda path: expected + "0" * 56)
    return file


@pytest.mark.parametrize(("name", "file"), [("alex", "alexnet"), ("vgg", "vgg16"), ("inception", "inception")])
def test_missing_weights_name_the_expected_path(torch_home: Path, tmp_path: Path, name: str, file: str) -> None:
    with pytest.raises(ModelError, match=rf"not at {torch_home}.*{file}.*--download.*--weights"):
        JudgeWeights().find(name)
    with pytest.raises(ModelError, match=rf"not at {tmp_path}/mine/.*{file}.* or {torch_home}"):
        JudgeWeights(tmp_path / "mine").find(name)


def test_unknown_net(torch_home: Path) -> None:
    with pytest.raises(ValueError, match="expected one of alex, vgg, squeeze"):
        Lpips("resnet", JudgeWeights())


def test_a_file_that_is_not_what_its_name_says_is_refused(torch_home: Path) -> None:
    file = torch_home / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"something else")
    with pytest.raises(ModelError, match=r"has SHA-256 .*expected 7be5be79"):
        JudgeWeights().find("alex")


def test_download(torch_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"published weights"
    source = tmp_path / f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    source.write_bytes(content)
    monkeypatch.setattr(weights, "weights_url", lambda name: source.as_uri())
    found = JudgeWeights(download=True).find("alex")
    assert found == torch_home / "hub" / "checkpoints" / source.name and found.read_bytes() == content
    source.unlink()
    assert JudgeWeights().find("alex") == found
    found.unlink()
    with pytest.raises(ModelError, match="could not be fetched"):
        JudgeWeights(download=True).find("alex")
    assert not list(torch_home.rglob("*.pth"))


NETS = [
    "squeeze",
    pytest.param("alex", marks=pytest.mark.slow),  # large layers take seconds to draw
    pytest.param("vgg", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("net", NETS)
def test_lpips_is_that_of_the_package_from_cache_and_from_a_folder(
    torch_home: Path, tmp_path: Path, net: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lpips
    from torchvision import models

    torch.manual_seed(0)
    build = {"squeeze": models.squeezenet1_1, "alex": models.alexnet, "vgg": models.vgg16}[net]
    cached = put(net, build().state_dict(), torch_home / "hub" / "checkpoints", monkeypatch)
    found = Lpips(net, JudgeWeights())
    assert cached.name in found.definition
    references, images = batch()
    assert found(references, references).tolist() == [0, 0, 0]
    direct = lpips.LPIPS(net=net, verbose=False)
    with torch.inference_mode():
        for i, value in enumerate(found(references, images)):
            a, b = (x[i : i + 1].permute(0, 3, 1, 2) / 127.5 - 1 for x in (references, images))
            assert value.item() == pytest.approx(direct(a, b).item(), abs=1e-4)
            assert value > 0
    (tmp_path / "mine").mkdir()
    cached.rename(tmp_path / "mine" / cached.name)
    again = Lpips(net, JudgeWeights(tmp_path / "mine"))
    assert torch.equal(again(references, images), found(references, images))


def test_frechet_distance_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 6)), rng.normal(0.5, 1.7, size=(60, 6)) @ rng.normal(size=(6, 6))
    distance = FrechetDistance(6)
    for start in range(0, 60, 20):  # in batches
        distance.add(*(torch.from_numpy(x[start : start + 20]) for x in (a, b)))
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert distance.value(60) == pytest.approx(expected, abs=1e-4)
    same = FrechetDistance(6)
    same.add(torch.from_numpy(a), torch.from_numpy(a))
    assert same.value(60) == pytest.approx(0, abs=1e-4)
    alone = FrechetDistance(6)
    alone.add(torch.ones(1, 6), torch.ones(1, 6))
    assert alone.value(1) is None


@pytest.mark.slow
def test_inception_features_are_those_of_torch_fidelity(torch_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    with monkeypatch.context() as patch:  # built without weights, to have some to save
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        direct = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    put("inception", direct.state_dict(), torch_home / "hub" / "checkpoints", monkeypatch)
    images = batch()[0]
    found = Inception(JudgeWeights())(images)
    expected = direct(images.permute(0, 3, 1, 2))[0]
    assert found.shape == (3, 2048) and math.isfinite(found.sum())
    assert torch.allclose(found, expected, atol=1e-4)
