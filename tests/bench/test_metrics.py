"""Metrics against scikit-image and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, uniform_filter
from scipy.special import stdtrit
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from v2flow_cli.bench import codebook_use, similarity
from v2flow_cli.bench.metrics import METRICS, estimate, student_t_97_5


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
    psnr, ssim = similarity.psnr(references, images), similarity.ssim(references, images)
    for i, (a, b) in enumerate(zip(references.numpy(), images.numpy())):
        assert psnr[i].item() == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), abs=1e-4)
        expected = structural_similarity(
            a, b, channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert ssim[i].item() == pytest.approx(expected, abs=1e-4)


def test_closed_forms() -> None:
    black = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    five = torch.full_like(black, 5)
    assert similarity.psnr(black, five).item() == pytest.approx(20 * math.log10(255 / 5), abs=1e-9)
    assert similarity.psnr(black, black).item() == math.inf
    assert similarity.ssim(black, black).item() == pytest.approx(1, abs=1e-6)
    c1 = (0.01 * 255) ** 2  # two constant images: only the luminance term is left
    assert similarity.ssim(black, five).item() == pytest.approx(c1 / (25 + c1), abs=1e-4)


def contrast_by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    """The contrast-structure term of SSIM over the windows wholly inside, (H, W, 3) in 0..255."""

    def mean(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, radius=5, axes=(0, 1))

    c2 = (0.03 * 255) ** 2
    covariance = mean(a * b) - mean(a) * mean(b)
    variances = mean(a * a) - mean(a) ** 2 + mean(b * b) - mean(b) ** 2
    return ((2 * covariance + c2) / (variances + c2))[5:-5, 5:-5].mean()


def test_ms_ssim_agrees_with_scipy_and_scikit_image_for_each_image() -> None:
    references, images = (torch.from_numpy(np.stack(x)) for x in zip(*(pair(seed, 192) for seed in range(3))))
    found = similarity.ms_ssim(references, images)
    assert found is not None
    for i in range(3):
        a, b, expected = references[i].double().numpy(), images[i].double().numpy(), 1.0
        for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
            if scale == 4:
                options = dict(channel_axis=-1, data_range=255, sigma=1.5, use_sample_covariance=False)
                expected *= structural_similarity(a, b, gaussian_weights=True, **options) ** weight
            else:
                expected *= contrast_by_scipy(a, b) ** weight
            a, b = (uniform_filter(x, 2, origin=-1, axes=(0, 1))[::2, ::2] for x in (a, b))
        assert found[i].item() == pytest.approx(expected, abs=1e-4)
    assert similarity.ms_ssim(references, references).tolist() == pytest.approx([1, 1, 1], abs=1e-6)


def test_ms_ssim_of_small_images_is_none() -> None:
    black = torch.zeros(1, 176, 176, 3, dtype=torch.uint8)
    assert similarity.ms_ssim(black, black) is not None
    assert similarity.ms_ssim(black[:, 1:], black[:, 1:]) is None


def test_estimate_is_students_t() -> None:
    found = estimate([20.0, 22.0, 24.0])
    assert (found.mean, found.count) == (22.0, 3)
    assert found.ci95 == pytest.approx(4.302653 * 2 / math.sqrt(3), abs=1e-5)
    assert math.isnan(estimate([1.0]).ci95)
    assert estimate([1.0, math.inf]).mean == math.inf
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_codebook_figures_by_hand() -> None:
    counter = codebook_use.CodebookCounter(8)
    counter.add(torch.tensor([[0, 0, 1, 1]]))
    counter.add(torch.tensor([[2, 2, 3, 3]]))
    found = counter.figures()
    assert (found.distinct, found.usage, found.tokens) == (4, 0.5, 8)
    assert found.perplexity == pytest.approx(4)
    assert found.entropy_bits == pytest.approx(2)
    # Krichevsky-Trofimov, one id after the other: p(id) = (seen + 1/2) / (ids so far + K/2)
    counts, bits = [0] * 8, 0.0
    for i in (0, 0, 1, 1, 2, 2, 3, 3):
        bits -= math.log2((counts[i] + 0.5) / (sum(counts) + 4))
        counts[i] += 1
    assert found.adaptive_bits == pytest.approx(bits / 8, abs=1e-9)
    assert found.entropy_bits < found.adaptive_bits
    single = codebook_use.CodebookCounter(8)
    single.add(torch.zeros(1, 5, dtype=torch.int64))
    assert (single.figures().perplexity, single.figures().entropy_bits) == (1, 0)


def test_bytes_and_bits() -> None:
    assert codebook_use.token_bytes(256, 16_384) == 448
    assert codebook_use.token_bytes(3, 4) == 1  # 6 bits
    assert codebook_use.token_bytes(3, 5) == 2  # 9 bits
    assert codebook_use.bits_per_pixel(448, 256 * 256) == pytest.approx(14 / 256)


def test_each_metric_has_one_function_and_a_unique_key() -> None:
    assert len({metric.key for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert sum(function is not None for function in (metric.of_images, metric.of_set, metric.of_system)) == 1
        assert bool(metric.better) == (metric.of_system is None)  # what is plotted is measured on pictures


def test_figures_as_text() -> None:
    psnr, tokens = (next(m for m in METRICS if m.key == key) for key in ("psnr_db", "tokens_per_image"))
    assert psnr.show(21.004, 0.126) == "21.00 ± 0.13" and psnr.show(21.0) == "21.00"
    assert psnr.show(None) == psnr.show(math.inf) == "∞"
    assert tokens.show(1024) == "1,024" and tokens.show(None) == "-" and tokens.show(0) == "0"


@pytest.mark.parametrize("degrees", [1, 2, 3, 10, 195, 49_999])
def test_the_quantile_of_students_t_is_scipys(degrees):
    assert student_t_97_5(degrees) == pytest.approx(float(stdtrit(degrees, 0.975)), rel=1e-9)
