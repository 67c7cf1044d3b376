"""Complete benches of a tiny tokenizer."""

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

from tests.tokenizer.test_seams import build
from v2flow_cli.bench.networks import MetricNetworks
from v2flow_cli.bench.results import as_csv, as_record, images_csv, tables
from v2flow_cli.bench.run import Bench, run_bench
from v2flow_cli.bench.sweep import parse_sweeps
from v2flow_cli.errors import DataError
from v2flow_cli.jobs.decode import image_seed
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.preprocess import to_uint8


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_folder: Path) -> V2FlowTokenizer:
    return V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder)


@pytest.fixture
def photos(sample_images: list[Image.Image]) -> list[tuple[str, Image.Image]]:
    return [(f"p{i}", image) for i, image in enumerate(sample_images)]


def run(tokenizer: V2FlowTokenizer, photos, **options) -> Bench:
    return run_bench({"v2flow": tokenizer}, photos, **{"with_codecs": False, "with_speed": False, **options})


def record_of(bench: Bench) -> dict:
    return as_record(tables([bench]), bench.notes)


def test_every_image_on_every_system(tokenizer, photos) -> None:
    settings = parse_sweeps(["cfg=1,3"])
    bench = run(tokenizer, photos, batch_size=2, settings=settings, keep=3, with_codecs=True, with_speed=True)
    systems = ["v2flow, cfg 1", "v2flow, cfg 3", "autoencoder alone", "JPEG", "WebP", "AVIF"]
    assert [row.system for row in bench.result.rows] == systems
    assert [(f.image, f.system) for f in bench.result.images] == [(n, s) for n, _ in photos for s in systems]
    assert [row.system for row in bench.result.coders] == systems[:2]
    assert [image.name for image in bench.result.kept] == ["p0", "p1", "p2"]
    assert [row.system for row in bench.result.rows if row.speed] == systems[:2]
    assert bench.result.rows[0].speed.encode_images_per_s > 0
    assert [(row.tokens_per_image, row.codebook.tokens) for row in bench.result.coders] == [(4, 20), (4, 20)]
    for row in bench.result.rows:
        single = [f.values["psnr_db"] for f in bench.result.images if f.system == row.system]
        assert row.values["psnr_db"].mean == pytest.approx(np.mean(single)) and row.values["psnr_db"].count == 5
    assert bench.result.rows[0].bytes_per_image == math.ceil(4 * 6 / 8)
    assert bench.result.rows[2].bytes_per_image is None


def test_pictures_are_those_of_decode(tokenizer, photos) -> None:
    bench = run(tokenizer, photos, batch_size=3, seed=7, keep=5)
    image = tokenizer.image_processor.preprocess_one(photos[4][1], 32)[None]
    ids = tokenizer.encode(image)
    decoded = to_uint8(tokenizer.decode(ids, seeds=[image_seed(7, "p4")]))
    kept = bench.result.kept[4]
    assert np.array_equal(kept.token_ids["v2flow"], ids[0].numpy())
    assert np.abs(kept.pictures["v2flow"].astype(int) - decoded[0].numpy()).max() <= 1
    assert np.array_equal(kept.reference, to_uint8(image)[0].numpy())


def test_protocol_key_names_what_figures_must_share(tokenizer, photos) -> None:
    def key(chosen, **options) -> str:
        return run(tokenizer, chosen, **options).result.protocol.key

    first = key(photos)
    settings = parse_sweeps(["cfg=2"])
    assert first == key(photos, batch_size=2, seed=3, settings=settings, networks=MetricNetworks(notes=("no LPIPS",)))
    assert first != key(photos[:4])
    assert first != key(photos[::-1])
    assert first != key(photos, size=64)


def test_photos_are_read_one_batch_at_a_time(tokenizer, photos) -> None:
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

    run(tokenizer, stream(), batch_size=2, tick=tick)
    assert done == 12 and max(ahead) == 0


def test_record_and_csv(tokenizer, photos) -> None:
    bench = run(tokenizer, photos, networks=MetricNetworks(notes=("LPIPS is left out: no weights",)))
    record = json.loads(json.dumps(record_of(bench), allow_nan=False))
    assert [p["key"] for p in record["protocols"]] == [bench.result.protocol.key]
    assert record["protocols"][0]["count"] == 5 and record["protocols"][0]["lpips"] is None
    assert record["notes"][0] == "LPIPS is left out: no weights" and "MS-SSIM is left out" in record["notes"][1]
    row = record["measured"][0]
    assert row["system"] == "v2flow" and row["lpips"] is None and row["psnr_db"] > 0
    assert row["protocol"] == bench.result.protocol.key and row["weights_digest"] == tokenizer.digest
    assert row["settings"] == tokenizer.config.sampling
    codebook = row["codebook"]
    assert row["entropy_bits_per_pixel"] == pytest.approx(codebook["entropy_bits"] * 4 / 32**2)
    assert row["entropy_bits_per_pixel"] < row["bits_per_pixel"] == pytest.approx(24 / 32**2)
    lines = list(csv.DictReader(io.StringIO(images_csv([bench]))))
    assert len(lines) == 5 * len(record["measured"])
    assert lines[0]["lpips"] == "" and float(lines[0]["psnr_db"]) == pytest.approx(
        bench.result.images[0].values["psnr_db"], 1e-5
    )
    table = list(csv.DictReader(io.StringIO(as_csv(tables([bench])))))
    assert [line["system"] for line in table] == ["v2flow", "autoencoder alone"]
    assert float(table[0]["psnr_db"]) == pytest.approx(row["psnr_db"], 1e-5) and table[1]["codebook_size"] == ""
    assert table[0]["codebook_size"] == "64" and json.loads(table[0]["settings"]) == row["settings"]


def test_equal_pictures_are_null_in_the_record(tokenizer, photos, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "autoencode", lambda images: images)
    bench = run(tokenizer, photos)
    row = record_of(bench)["measured"][1]
    assert bench.result.rows[1].values["psnr_db"].mean == math.inf
    assert row["psnr_db"] is None and row["ssim"] == pytest.approx(1)


def test_bad_requests(tokenizer, photos) -> None:
    with pytest.raises(DataError, match="No image could be read"):
        run(tokenizer, [])
    with pytest.raises(DataError, match=r"--res 33: v2flow: .*multiples of"):
        run(tokenizer, photos, size=33)


def test_several_models_share_photos_and_an_equal_autoencoder(tokenizer, photos, tiny_tokenizer_folder) -> None:
    other = V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder)
    with torch.no_grad():
        other.flow.out.bias.add_(1.0)  # decodes to other pictures
    bench = run_bench({"a": tokenizer, "b": other}, photos[:2], with_speed=False, codec_bytes=(100,))
    names = ["a", "b", "autoencoder alone"]
    names += [f"{codec}, {size} bytes" for codec in ("JPEG", "WebP", "AVIF") for size in (3, 100)]
    assert [row.system for row in bench.result.rows] == names
    a, b = bench.result.coders
    assert (
        a.codebook == b.codebook
        and a.values["psnr_db"].mean != b.values["psnr_db"].mean
        and a.weights_digest != b.weights_digest
    )
    with torch.no_grad():
        next(other.latents.parameters()).add_(0.1)
    rows = run_bench({"a": tokenizer, "b": other}, photos[:2], with_codecs=False, with_speed=False).result.rows
    assert [row.system for row in rows] == ["a", "b", "autoencoder of a", "autoencoder of b"]


def test_prefixes_of_a_flexible_tokenizer(tokenizer, photos, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = tokenizer.decode
    seen = []

    def padded(ids, **options):  # the tiny model has a fixed length; the wiring is tested here
        seen.append(ids.shape[1])
        return decode(torch.nn.functional.pad(ids, (0, 4 - ids.shape[1])), **options)

    monkeypatch.setattr(V2FlowTokenizer, "flexible", True)
    monkeypatch.setattr(tokenizer, "decode", padded)
    bench = run(tokenizer, photos, settings=parse_sweeps(["tokens=1,2,4"]), with_speed=True)
    rows = bench.result.coders
    assert [(row.tokens_per_image, row.codebook.tokens) for row in rows] == [(1, 5), (2, 10), (4, 20)]
    assert [row.bytes_per_image for row in rows] == [1, 2, 3] and set(seen) == {1, 2, 4}
    assert [row.system for row in rows if row.speed] == ["v2flow, tokens 1", "v2flow, tokens 2", "v2flow, tokens 4"]


def test_bf16_is_close_to_float32(tokenizer, photos) -> None:
    exact, rounded = (
        run(tokenizer, photos[:2], dtype=dtype).result.rows[1].values["psnr_db"].mean
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded == pytest.approx(exact, abs=0.5)


SHAPES = [(90, 90), (120, 70), (70, 120), (400, 60), (118, 71)]  # width, height


def test_a_flexible_model_keeps_aspects_at_a_number_of_tokens(photos) -> None:
    flexible = build()
    flexible.config.refine_steps = 2
    settings = parse_sweeps(["tokens=3"])
    [row] = run(flexible, photos[:2], size=32, keep_aspect=True, settings=settings).result.coders
    assert (row.system, row.tokens_per_image) == ("v2flow, tokens 3, refine 2", 3)


def test_pictures_keep_their_shapes_with_keep_aspect(tokenizer, photos) -> None:
    """The same figures as for a picture alone, whatever its neighbours; pixels and tokens are averages."""
    photos = [(name, image.resize(size)) for (name, image), size in zip(photos, SHAPES)]
    together = run(tokenizer, photos, batch_size=3, size=64, keep_aspect=True).result
    sizes = [tokenizer.fitted_size(*size, 64) for size in SHAPES]
    assert len(set(sizes)) > 2
    for photo in photos[1:4]:
        alone = run(tokenizer, [photo], batch_size=1, size=64, keep_aspect=True).result.figures_of(photo[0], "v2flow")
        figures = together.figures_of(photo[0], "v2flow").values
        assert figures["psnr_db"] == pytest.approx(alone.values["psnr_db"]) and figures.keys() == alone.values.keys()
    row, pixels = together.rows[0], sum(height * width for height, width in sizes) / len(sizes)
    assert row.tokens_per_image == pytest.approx(sum(tokenizer.num_tokens(*size) for size in sizes) / len(sizes))
    assert row.values["bits_per_pixel"] == pytest.approx(8 * row.bytes_per_image / pixels)
    assert "whole picture at the size nearest" in together.protocol.crop and "of 16 pixels" in together.protocol.crop
    square = run(tokenizer, photos, size=64).result
    assert square.protocol.key != together.protocol.key and square.rows[0].tokens_per_image == 16
