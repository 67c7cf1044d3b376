"""Codecs at a given number of bytes."""

import numpy as np
import pytest
from PIL import Image, features

from v2flow_cli.bench import codecs
from v2flow_cli.bench.codecs import CODECS, available_codecs, best_at


def picture(size: int = 96) -> np.ndarray:
    """Soft shapes with some texture, (H, W, 3) uint8."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_files_are_within_the_budget_and_near_it(codec) -> None:
    if not features.check(codec.feature):
        pytest.skip(f"this Pillow has no {codec.name}")
    reference = picture()
    small, large = (best_at(codec, reference, budget) for budget in (700, 1400))
    assert small.bytes <= 700 < large.bytes <= 1400
    assert large.psnr > small.psnr
    assert small.pixels.shape == reference.shape and small.pixels.dtype == np.uint8
    mse = np.square(small.pixels.astype(float) - reference).mean()
    assert small.psnr == pytest.approx(10 * np.log10(255**2 / mse))


def test_is_the_best_of_all_downscales(monkeypatch: pytest.MonkeyPatch) -> None:
    webp, reference = CODECS[1], picture()
    best = best_at(webp, reference, 300)
    for downscale in codecs.DOWNSCALES:
        monkeypatch.setattr(codecs, "DOWNSCALES", (downscale,))
        single = best_at(webp, reference, 300)
        assert single.bytes > 300 or single.psnr <= best.psnr


def test_the_smallest_file_if_none_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg = CODECS[0]
    found = best_at(jpeg, picture(), 10)
    assert found.bytes > 100  # the real size, headers and all
    for downscale in codecs.DOWNSCALES:
        monkeypatch.setattr(codecs, "DOWNSCALES", (downscale,))
        assert best_at(jpeg, picture(), 10).bytes >= found.bytes


def test_a_missing_codec_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda name: name != "avif")
    have, lines = available_codecs()
    assert [codec.name for codec in have] == ["JPEG", "WebP"]
    assert len(lines) == 1 and lines[0].startswith("AVIF is left out: this build of Pillow lacks it")
