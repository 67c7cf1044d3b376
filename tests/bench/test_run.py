"""Whole benches on a tiny tokenizer."""

import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from v2flow_cli.bench.run import as_csv, as_record, run_bench
from v2flow_cli.errors import DataError
from v2flow_cli.store.decode_set import image_seed
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.preprocess import to_uint8


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_folder: Path) -> V2FlowTokenizer:
    return V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder)


@pytest.fixture
def photos(sample_images: list[Image.Image]) -> list[tuple[str, Image.Image]]:
    return [(f"p{i}", image) for i, image in enumerate(sample_images)]


def test_every_image_on_every_system(tokenizer, photos) -> None:
    bench = run_bench(tokenizer, photos, batch_size=2, guidance_scales=(1.0, 3.0), keep=3)
    systems = ["v2flow, guidance 1", "v2flow, guidance 3", "autoencoder alone", "JPEG", "WebP", "AVIF"]
    assert [row.system for row in bench.result.rows] == systems
    assert [(f.image, f.system) for f in bench.result.images] == [(n, s) for n, _ in photos for s in systems]
    assert bench.main_systems == tuple(systems[:2])
    assert [image.name for image in bench.result.kept] == ["p0", "p1", "p2"]
    assert bench.speed is not None and bench.speed.encode_images_per_s > 0
    assert bench.result.codebook.tokens == 5 * bench.result.tokens_per_image
    for row in bench.result.rows:
        single = [f.psnr for f in bench.result.images if f.system == row.system]
        assert row.psnr.mean == pytest.approx(np.mean(single)) and row.psnr.count == 5
    assert bench.result.rows[0].bytes_per_image == math.ceil(bench.result.tokens_per_image * 6 / 8)
    assert bench.result.rows[2].bytes_per_image is None


def test_pictures_are_those_of_decode(tokenizer, photos) -> None:
    bench = run_bench(tokenizer, photos, batch_size=3, seed=7, with_codecs=False, with_speed=False, keep=5)
    image = tokenizer.image_processor.preprocess_one(photos[4][1], 32)[None]
    ids = tokenizer.encode(image)
    decoded = to_uint8(tokenizer.decode(ids, seeds=[image_seed(7, "p4")]))
    kept = bench.result.kept[4]
    assert np.array_equal(kept.token_ids, ids[0].numpy())
    assert np.abs(kept.pictures["v2flow"].astype(int) - decoded[0].numpy()).max() <= 1
    assert np.array_equal(kept.reference, to_uint8(image)[0].numpy())


def test_protocol_key_names_what_figures_must_share(tokenizer, photos) -> None:
    def key(chosen, **options) -> str:
        bench = run_bench(tokenizer, chosen, with_codecs=False, with_speed=False, **options)
        return bench.result.protocol.key

    first = key(photos)
    assert first == key(photos, batch_size=2, seed=3, guidance_scales=(2.0,))
    assert first != key(photos[:4])
    assert first != key(photos[::-1])
    assert first != key(photos, size=64)
    assert first != key(photos, lpips_note="another backbone")


def test_photos_are_read_as_they_are_needed(tokenizer, photos) -> None:
    ahead: list[int] = []
    given = done = 0

    def stream() -> Iterator[tuple[str, Image.Image]]:
        nonlocal given
        for i in range(12):
            given += 1
            yield f"{i}", photos[i % 5][1]

    def tick(advance: int) -> None:
        nonlocal done
        done += advance
        ahead.append(given - done)

    run_bench(tokenizer, stream(), batch_size=2, with_codecs=False, with_speed=False, tick=tick)
    assert done == 12 and max(ahead) == 0


def test_record_and_csv(tokenizer, photos) -> None:
    bench = run_bench(tokenizer, photos, with_speed=False, lpips_note="LPIPS is left out: no weights")
    record = json.loads(json.dumps(as_record(bench), allow_nan=False))
    assert record["protocol"]["key"] == bench.result.protocol.key
    assert record["protocol"]["count"] == 5 and record["weights_digest"] == tokenizer.digest
    assert record["notes"] == ["LPIPS is left out: no weights"]
    row = record["measured"][0]
    assert row["system"] == "v2flow" and row["lpips"] is None and row["psnr_db"] > 0
    assert row["settings"] == tokenizer.config.sampling
    lines = list(csv.DictReader(io.StringIO(as_csv(bench))))
    assert len(lines) == 5 * len(record["measured"])
    assert lines[0]["lpips"] == "" and float(lines[0]["psnr_db"]) == pytest.approx(bench.result.images[0].psnr, 1e-5)


def test_equal_pictures_are_null_in_the_record(tokenizer, photos, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "autoencode", lambda images: images)
    bench = run_bench(tokenizer, photos, with_codecs=False, with_speed=False)
    row = as_record(bench)["measured"][1]
    assert bench.result.rows[1].psnr.mean == math.inf
    assert row["psnr_db"] is None and row["ssim"] == pytest.approx(1)


def test_bad_requests(tokenizer, photos) -> None:
    with pytest.raises(DataError, match="nothing to measure"):
        run_bench(tokenizer, [])
    with pytest.raises(DataError, match=r"--res 33: .*multiples of"):
        run_bench(tokenizer, photos, size=33)


def test_bf16_is_close_to_float32(tokenizer, photos) -> None:
    exact, rounded = (
        run_bench(tokenizer, photos[:2], dtype=dtype, with_codecs=False, with_speed=False).result.rows[1].psnr.mean
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded == pytest.approx(exact, abs=0.5)
