"""Token files and manifests: round trips, and one sentence for every way in which they can be wrong."""

import json

import numpy as np
import pytest

from v2flow_cli.errors import DataError, TokenFileError
from v2flow_cli.store.files import check_absent, map_ahead, replacing, write_bytes
from v2flow_cli.store.token_file import (
    load_samples,
    load_token_ids,
    read_token_set,
    samples_path,
    save_samples,
    save_token_ids,
)
from v2flow_cli.store.token_manifest import TokenManifest, find_manifest

MANIFEST = TokenManifest("0123456789abcdef", (32, 32), 64, 4, {"a": 1, "sub/b": 1})


@pytest.mark.parametrize(("codebook_size", "dtype"), [(64, "<u2"), (65_536, "<u2"), (65_537, "<u4")])
@pytest.mark.parametrize("shape", [(4,), (3, 4)])
def test_ids_round_trip_in_the_smallest_type(tmp_path, codebook_size, dtype, shape):
    ids = np.random.default_rng(0).integers(0, codebook_size, shape)
    ids.flat[0] = codebook_size - 1
    save_token_ids(tmp_path / "x.npy", ids, codebook_size)
    assert np.load(tmp_path / "x.npy").dtype == np.dtype(dtype)
    assert np.array_equal(load_token_ids(tmp_path / "x.npy", codebook_size, 4), ids)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(4, np.float32), "dtype is float32; token ids are integers"),
        (np.zeros(4, bool), "dtype is bool"),
        (np.array([1, None, 2, 3], object), "not a complete .npy of token ids"),
        (np.zeros((), np.uint16), r"shape is \(\)"),
        (np.zeros((2, 2, 4), np.uint16), r"shape is \(2, 2, 4\)"),
        (np.zeros((0, 4), np.uint16), "npy"),
        (np.array([0, 64, 1, 2]), "holds the id 64; the codebook has ids 0 to 63"),
        (np.array([0, -1, 1, 2]), "holds the id -1"),
        (np.zeros(5, np.uint16), "5 tokens an image; expected 4"),
    ],
)
def test_arrays_that_are_not_token_ids(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(TokenFileError, match=message):
        load_token_ids(tmp_path / "x.npy", 64, 4)


def test_files_that_are_not_arrays(tmp_path):
    with pytest.raises(TokenFileError, match="no such token file"):
        load_token_ids(tmp_path / "none.npy", 64)
    (tmp_path / "empty.npy").touch()
    (tmp_path / "text.npy").write_text("text")
    np.savez(tmp_path / "x.npz", a=np.zeros(4))
    (tmp_path / "x.npz").rename(tmp_path / "zip.npy")
    np.save(tmp_path / "cut.npy", np.zeros(400, np.uint16))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-10])
    for name in ("empty", "text", "cut"):
        with pytest.raises(TokenFileError, match=r"not a complete \.npy"):
            load_token_ids(tmp_path / f"{name}.npy", 64)
    with pytest.raises(TokenFileError, match="an archive of arrays"):
        load_token_ids(tmp_path / "zip.npy", 64)


def test_mutated_token_files_raise_only_our_error(tmp_path):
    save_token_ids(tmp_path / "x.npy", np.arange(64).reshape(16, 4), 64)
    content = (tmp_path / "x.npy").read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        for at in generator.integers(0, len(damaged), 3):
            damaged[at] = generator.integers(0, 256)
        (tmp_path / "y.npy").write_bytes(damaged)
        try:
            ids = load_token_ids(tmp_path / "y.npy", 64)
            assert ids.min() >= 0 and ids.max() < 64
        except TokenFileError:
            pass


def test_manifest_round_trip(tmp_path):
    MANIFEST.save(tmp_path)
    assert TokenManifest.load(tmp_path) == MANIFEST
    assert json.loads((tmp_path / "manifest.json").read_text())["count"] == MANIFEST.count == 2


def test_no_manifest_and_foreign_manifests_are_none(tmp_path):
    assert TokenManifest.load(tmp_path) is None
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    assert TokenManifest.load(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 4}, "format version 4; this v2flow reads up to 3. Update v2flow"),
        ({"aspect": "wide"}, "aspect is .wide.; expected square or keep"),
        ({"format_version": None}, "format_version is None"),
        ({"tokenizer_digest": 1}, "tokenizer_digest is 1"),
        ({"image_size": [32]}, r"image_size is \[32\]"),
        ({"image_size": [32, True]}, "image_size is"),
        ({"codebook_size": 0}, "codebook_size is 0"),
        ({"tokens_per_image": "4"}, "tokens_per_image is '4'"),
        ({"files": ["a"]}, "files is not a mapping"),
        ({"files": {"a": -1}}, "files is not a mapping"),
        ({"count": 7}, "count is 7; files add up to 2"),
    ],
)
def test_wrong_manifests(tmp_path, change, message):
    MANIFEST.save(tmp_path)
    record = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**record, **change}))
    with pytest.raises(TokenFileError, match=message):
        TokenManifest.load(tmp_path)


def test_a_square_size_may_be_one_number(tmp_path):
    MANIFEST.save(tmp_path)
    record = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**record, "image_size": 32}))
    assert TokenManifest.load(tmp_path) == MANIFEST


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_manifest(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(TokenFileError, match="cannot be read as JSON"):
        TokenManifest.load(tmp_path)


def test_another_tokenizer_is_refused():
    MANIFEST.check_tokenizer("0123456789abcdef", "x.npy")
    with pytest.raises(TokenFileError, match="encoded by tokenizer 0123456789abcdef, but this tokenizer is ffff"):
        MANIFEST.check_tokenizer("ffff", "x.npy")


def test_a_manifest_holds_only_for_the_files_it_lists(tmp_path):
    MANIFEST.save(tmp_path)
    assert find_manifest(tmp_path / "a.npy") == MANIFEST
    assert find_manifest(tmp_path / "sub" / "b.npy") == MANIFEST
    assert find_manifest(tmp_path / "b.npy") is None
    assert find_manifest(tmp_path / "sub" / "a.npy") is None


def test_samples_round_trip_any_text(tmp_path):
    samples = [("a/1", ("line\u2028separator", "ü\n")), ("b", ()), ("\ud800", ("x",))]
    save_samples(tmp_path / "x.npy", samples)
    assert load_samples(tmp_path / "x.npy") == [*samples[:2], ("\\ud800", ("x",))]  # what is no text is printable
    assert load_samples(tmp_path / "y.npy") is None


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"key": 1, "captions": []}', '{"key": "a"}', '{"key": "a", "captions": [1]}', ""]
)
def test_damaged_samples(tmp_path, line):
    samples_path(tmp_path / "x.npy").write_text('{"key": "a", "captions": []}\n' + line + "\n")
    with pytest.raises(TokenFileError, match="line 2"):
        load_samples(tmp_path / "x.npy")


def test_read_token_set_of_images(tmp_path):
    MANIFEST.save(tmp_path)
    for i, name in enumerate(MANIFEST.files):
        save_token_ids(tmp_path / f"{name}.npy", np.full(4, i), 64)
    samples = list(read_token_set(tmp_path))
    assert [(s.key, s.captions, s.token_ids.tolist()) for s in samples] == [
        ("a", (), [0] * 4),
        ("sub/b", (), [1] * 4),
    ]
    assert samples[0].token_ids.dtype == np.int64


def test_read_token_set_of_shards(tmp_path):
    TokenManifest("d", (32, 32), 64, 4, {"s0": 2}).save(tmp_path)
    save_token_ids(tmp_path / "s0.npy", np.array([[1] * 4, [2] * 4]), 64)
    save_samples(tmp_path / "s0.npy", [("x", ("one", "two")), ("y", ())])
    found = [(key, captions, ids.tolist()) for key, captions, ids in read_token_set(tmp_path)]
    assert found == [("x", ("one", "two"), [1] * 4), ("y", (), [2] * 4)]
    save_samples(tmp_path / "s0.npy", [("x", ())])
    with pytest.raises(TokenFileError, match="2 rows, 1 keys, and 2 in the manifest"):
        list(read_token_set(tmp_path))


def test_read_token_set_needs_a_manifest(tmp_path):
    with pytest.raises(TokenFileError, match="no token manifest in it"):
        list(read_token_set(tmp_path))


def test_incomplete_files_are_not_visible(tmp_path):
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "x") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    write_bytes(tmp_path / "new" / "x", b"whole")
    assert (tmp_path / "new" / "x").read_bytes() == b"whole"
    with pytest.raises(DataError, match="cannot be written"):
        write_bytes(tmp_path / "new" / "x" / "y", b"")


def test_existing_outputs_are_named(tmp_path):
    (tmp_path / "a").touch()
    check_absent([tmp_path / "a"], force=True)
    check_absent([tmp_path / "b"], force=False)
    with pytest.raises(DataError, match=r"a: exists already\. Use --force"):
        check_absent([tmp_path / "a", tmp_path / "b"], force=False)


def test_map_ahead_keeps_order_bounds_memory_and_passes_errors_on():
    drawn = []

    def items():
        for i in range(20):
            drawn.append(i)
            yield i

    results = map_ahead(lambda i: i * i, items(), workers=3, ahead=5)
    assert next(results) == 0
    assert len(drawn) == 5
    assert list(results) == [i * i for i in range(1, 20)]
    with pytest.raises(ZeroDivisionError):
        list(map_ahead(lambda i: 1 // i, [1, 0, 1], workers=2, ahead=2))


VARIABLE = TokenManifest("0123456789abcdef", (32, 32), 64, 4, {"set": 3}, variable_length=True, min_psnr_db=20.0)


def test_sequences_of_different_lengths_round_trip(tmp_path):
    rows = [np.array([5]), np.array([1, 2, 3]), np.array([0, 63])]
    save_token_ids(tmp_path / "set.npy", rows, 64)
    assert np.load(tmp_path / "set.npy").tolist() == [[5, 64, 64], [1, 2, 3], [0, 63, 64]]
    save_samples(tmp_path / "set.npy", [("a", ()), ("b", ("two",)), ("c", ())])
    VARIABLE.save(tmp_path)
    assert TokenManifest.load(tmp_path) == VARIABLE
    assert [s.token_ids.tolist() for s in read_token_set(tmp_path)] == [[5], [1, 2, 3], [0, 63]]


def test_the_end_mark_of_the_largest_codebook_needs_the_wider_type(tmp_path):
    save_token_ids(tmp_path / "x.npy", [np.array([65_535]), np.array([1, 2])], 65_536)
    assert np.load(tmp_path / "x.npy").dtype == np.dtype("<u4")
    save_token_ids(tmp_path / "x.npy", [np.array([65_535, 0]), np.array([1, 2])], 65_536)
    assert np.load(tmp_path / "x.npy").dtype == np.dtype("<u2")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 64, 2], [1, 2, 3]], "the padding 64 comes before an id, or fills a row"),
        ([[64, 64, 64], [1, 2, 3]], "the padding 64 comes before an id, or fills a row"),
        ([[1, 65, 64], [1, 2, 3]], "holds the id 65"),
        ([1, 64], "holds the id 64"),
        ([[1, 2, 3, 4, 5]], "5 tokens an image; expected at most 4"),
    ],
)
def test_rows_with_misplaced_padding(tmp_path, ids, message):
    np.save(tmp_path / "x.npy", np.array(ids, np.uint16))
    with pytest.raises(TokenFileError, match=message):
        load_token_ids(tmp_path / "x.npy", 64, 4, variable_length=True)


def test_a_set_of_fixed_length_has_format_version_1(tmp_path):
    MANIFEST.save(tmp_path)
    record = json.loads((tmp_path / "manifest.json").read_text())
    assert record["format_version"] == 1 and "variable_length" not in record
    VARIABLE.save(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["format_version"] == 2
    assert not VARIABLE.same_tokens(TokenManifest("0123456789abcdef", (32, 32), 64, 4))
