"""Metrics against scikit-image and closed forms."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from v2flow_cli.bench import metrics
from v2flow_cli.errors import ModelError


def pair(seed: int, size: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """A smooth 8-bit picture and a noisy version of it, (H, W, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    picture = np.stack([127 + 120 * np.sin(5 * x + c) * np.cos(4 * y + seed) for c in range(3)], axis=-1)
    noisy = picture + rng.normal(0, 4 + 10 * seed, picture.shape)
    return picture.round().astype(np.uint8), noisy.round().clip(0, 255).astype(np.uint8)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    references, images = zip(*(pair(seed) for seed in range(3)))
    return torch.from_numpy(np.stack(references)), torch.from_numpy(np.stack(images))


def test_psnr_and_ssim_agree_with_scikit_image_for_each_image() -> None:
    references, images = batch()
    psnr, ssim = metrics.psnr(references, images), metrics.ssim(references, images)
    for i, (a, b) in enumerate(zip(references.numpy(), images.numpy())):
        assert psnr[i].item() == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), abs=1e-4)
        expected = structural_similarity(
            a, b, channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert ssim[i].item() == pytest.approx(expected, abs=1e-4)


def test_closed_forms() -> None:
    black = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    five = torch.full_like(black, 5)
    assert metrics.psnr(black, five).item() == pytest.approx(20 * math.log10(255 / 5), abs=1e-9)
    assert metrics.psnr(black, black).item() == math.inf
    assert metrics.ssim(black, black).item() == pytest.approx(1, abs=1e-6)
    c1 = (0.01 * 255) ** 2  # two constant images: only the luminance term is left
    assert metrics.ssim(black, five).item() == pytest.approx(c1 / (25 + c1), abs=1e-4)


def test_estimate_is_students_t() -> None:
    found = metrics.estimate([20.0, 22.0, 24.0])
    assert (found.mean, found.count) == (22.0, 3)
    assert found.ci95 == pytest.approx(4.302653 * 2 / math.sqrt(3), abs=1e-5)
    assert math.isnan(metrics.estimate([1.0]).ci95)
    assert metrics.estimate([1.0, math.inf]).mean == math.inf
    with pytest.raises(ValueError, match="no values"):
        metrics.estimate([])


def test_codebook_figures_by_hand() -> None:
    counter = metrics.CodebookCounter(8)
    counter.add(torch.tensor([[0, 0, 1, 1]]))
    counter.add(torch.tensor([[2, 2, 3, 3]]))
    found = counter.figures()
    assert (found.distinct, found.usage, found.tokens) == (4, 0.5, 8)
    assert found.perplexity == pytest.approx(4)
    assert found.entropy_bits == pytest.approx(2)
    single = metrics.CodebookCounter(8)
    single.add(torch.zeros(1, 5, dtype=torch.int64))
    assert (single.figures().perplexity, single.figures().entropy_bits) == (1, 0)


def test_bytes_and_bits() -> None:
    assert metrics.token_bytes(256, 16_384) == 448
    assert metrics.token_bytes(3, 4) == 1  # 6 bits
    assert metrics.token_bytes(3, 5) == 2  # 9 bits
    assert metrics.bits_per_pixel(448, 256, 256) == pytest.approx(14 / 256)


@pytest.fixture
def torch_home(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_HUB", raising=False)
    return tmp_path


def test_lpips_without_weights_says_where_they_belong(torch_home) -> None:
    with pytest.raises(ModelError, match=r"alex backbone is not at .*alexnet.*--lpips-download"):
        metrics.load_lpips("alex")
    with pytest.raises(ValueError, match="expected one of alex, vgg, squeeze"):
        metrics.load_lpips("resnet")


def test_lpips_download_that_fails_is_an_error(torch_home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_backbone_url", lambda net: (torch_home / "none-12345678.pth").as_uri())
    with pytest.raises(ModelError, match="could not be fetched"):
        metrics.load_lpips("alex", download=True)
    assert not list(torch_home.rglob("*.pth"))


def test_lpips_with_cached_weights(torch_home) -> None:
    import lpips
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    file = metrics.lpips_backbone_file("squeeze")
    file.parent.mkdir(parents=True)
    torch.save(squeezenet1_1().state_dict(), file)  # random weights: the wiring is tested, not the network
    found = metrics.load_lpips("squeeze")
    references, images = batch()
    assert found(references, references).tolist() == [0, 0, 0]
    direct = lpips.LPIPS(net="squeeze", verbose=False)
    with torch.inference_mode():
        for i, value in enumerate(found(references, images)):
            a, b = (x[i : i + 1].permute(0, 3, 1, 2) / 127.5 - 1 for x in (references, images))
            assert value.item() == pytest.approx(direct(a, b).item(), abs=1e-4)
            assert value > 0
