"""``encode --tokens``, ``encode --max-error`` and ``decode`` of any length, on a tiny flexible tokenizer of 1 to 6."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.tokenizer.test_seams import build
from v2flow_cli.cli.app import app
from v2flow_cli.jobs.decode import image_seed
from v2flow_cli.jobs.lengths import length_histograms
from v2flow_cli.jobs.prefixes import shortest_prefixes
from v2flow_cli.store.token_file import read_token_set
from v2flow_cli.store.token_manifest import TokenManifest
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.preprocess import psnr, to_uint8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flexible")
    build().save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path, sample_images):
    (tmp_path / "imgs").mkdir()
    for i, image in enumerate(sample_images):
        image.resize((40, 40)).save(tmp_path / "imgs" / f"{i}.png")
    return tmp_path / "imgs"


def v2flow(command, *args, model, code=0):
    done = CliRunner().invoke(app, [command, *map(str, args), "--model", str(model), "--device", "cpu"])
    assert done.exit_code == code, done.output
    return done


def encoded(model, photos):
    """(tokenizer, keys, images, whole token ids) of the photos."""
    tokenizer = V2FlowTokenizer.from_pretrained(model)
    files = sorted(photos.glob("*.png"))
    images = torch.stack([tokenizer.image_processor.preprocess_one(Image.open(f), 32) for f in files])
    return tokenizer, [f.stem for f in files], images, tokenizer.encode(images)


def psnr_at(tokenizer, images, ids, keys, length):
    seeds = [image_seed(0, key) for key in keys]
    found = tokenizer.decode(ids[:, :length], height=32, width=32, seeds=seeds)
    return psnr(to_uint8(images), to_uint8(found))


def test_tokens_writes_prefixes_that_decode(model, photos, tmp_path):
    figures = json.loads(v2flow("encode", photos, "-o", tmp_path / "t", "--tokens", 2, "--json", model=model).stdout)
    assert (figures["tokens_per_image"], figures["variable_length"]) == (2, False)
    assert figures["mean_tokens_per_image"] == 2
    _, keys, _, whole = encoded(model, photos)
    for key, ids in zip(keys, whole.tolist()):
        assert np.load(tmp_path / "t" / f"{key}.npy").tolist() == ids[:2]
    v2flow("decode", tmp_path / "t", "-o", tmp_path / "out", model=model)
    assert len(list((tmp_path / "out").glob("*.png"))) == 5


def test_refined_tokens_are_recorded_and_not_mixed_with_others(model, photos, tmp_path):
    args = ("encode", photos, "-o", tmp_path / "t", "--tokens", 3)
    figures = json.loads(v2flow(*args, "--refine", 4, "--json", model=model).stdout)
    assert figures["refine_steps"] == 4 == TokenManifest.load(tmp_path / "t").refine_steps
    tokenizer, keys, images, whole = encoded(model, photos)
    best = tokenizer.encode(images, 3, refine_steps=4)
    assert not torch.equal(best, whole[:, :3])
    for key, ids in zip(keys, best.tolist()):
        assert np.load(tmp_path / "t" / f"{key}.npy").tolist() == ids
    for other in ((), ("--refine", 5)):
        message = v2flow(*args, *other, model=model, code=1).stderr
        assert "3 tokens an image, refined in 4 steps by model" in message
        assert "Use another -o, --refine 4, or --force." in message
    assert np.load(tmp_path / "t" / f"{keys[0]}.npy").tolist() == best[0].tolist()  # nothing was overwritten
    done = v2flow("encode", photos, "-o", tmp_path / "u", "--refine", 4, "--max-error", 10, model=model, code=1)
    assert "--refine and --max-error: use one of them" in done.stderr
    assert not (tmp_path / "u").exists()
    v2flow("decode", tmp_path / "t", "-o", tmp_path / "out", model=model)
    assert len(list((tmp_path / "out").glob("*.png"))) == 5


def test_a_model_refines_for_a_given_number_of_tokens(photos, tmp_path):
    tokenizer = build()
    tokenizer.config.refine_steps = 3
    tokenizer.save_pretrained(tmp_path / "model")
    tokenizer, keys, images, whole = encoded(tmp_path / "model", photos)
    best = tokenizer.encode(images, 2, refine_steps=3)
    assert not torch.equal(best, whole[:, :2])
    cases = {
        "t": (("--tokens", 2), 3, best),
        "u": (("--tokens", 2, "--refine", 0), 0, whole[:, :2]),
        "v": ((), 0, whole),
        "w": (("--max-error", 90), 0, whole),  # no picture is so good: all tokens are kept
    }
    for name, (options, steps, expected) in cases.items():
        v2flow("encode", photos, "-o", tmp_path / name, *options, model=tmp_path / "model")
        assert TokenManifest.load(tmp_path / name).refine_steps == steps
        for key, ids in zip(keys, expected.tolist()):
            assert np.load(tmp_path / name / f"{key}.npy").tolist() == ids


def test_ids_refined_for_another_decoder_are_not_mixed(model, photos, tmp_path):
    trained = build()
    trained.load_state_dict(V2FlowTokenizer.from_pretrained(model).state_dict())
    with torch.no_grad():
        next(trained.flow.parameters()).add_(0.1)
    trained.save_pretrained(tmp_path / "trained")
    for options in ((), ("--refine", 2)):
        args = ("encode", photos, "-o", tmp_path / f"t{len(options)}", "--tokens", 3, *options)
        v2flow(*args, model=model)
        message = v2flow(*args, model=tmp_path / "trained", code=1).stderr  # the first set is finished
        assert ("refined in 2 steps by model" if options else "exists already") in message


def test_max_error_keeps_the_shortest_sufficient_prefix(model, photos, tmp_path):
    tokenizer, keys, images, whole = encoded(model, photos)
    curves = torch.stack([psnr_at(tokenizer, images, whole, keys, k) for k in range(1, 7)])
    target = curves.median().item()
    done = v2flow("encode", photos, "-o", tmp_path / "t", "--max-error", target, "--json", model=model)
    figures = json.loads(done.stdout)
    lengths = {s.key: len(s.token_ids) for s in read_token_set(tmp_path / "t")}
    reached = 0
    for key, curve in zip(keys, curves.T.tolist()):
        k = lengths[key]
        if curve[k - 1] >= target:
            reached += 1
            assert k == 1 or curve[k - 2] < target  # one token less would not do
        else:
            assert k == 6  # nothing does: all are kept
    assert figures["short_of_max_error"] == 5 - reached and 0 < reached
    assert figures["variable_length"] and figures["mean_tokens_per_image"] == sum(lengths.values()) / 5
    manifest = TokenManifest.load(tmp_path / "t")
    assert (manifest.tokens_per_image, manifest.variable_length, manifest.min_psnr_db) == (6, True, target)
    v2flow("decode", tmp_path / "t", "-o", tmp_path / "out", "--dtype", "fp32", model=model)
    for key, reference, curve in zip(keys, to_uint8(images), curves.T.tolist()):
        picture = torch.from_numpy(np.asarray(Image.open(tmp_path / "out" / f"{key}.png")).copy())
        found = psnr(reference[None], picture[None]).item()
        assert found == pytest.approx(curve[lengths[key] - 1], abs=0.05)  # decode shows what encode measured


def test_a_histogram_of_the_tokens_that_each_input_needed(model, photos, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    for grey in (0, 128):
        Image.new("RGB", (40, 40), (grey, grey, grey)).save(plain / f"{grey}.png")
    tokenizer, keys, images, whole = encoded(model, photos)
    target = psnr_at(tokenizer, images, whole, keys, 3).median().item()
    done = v2flow("encode", photos, plain, "-o", tmp_path / "t", "--max-error", target, "--json", model=model)
    found = json.loads(done.stdout)["token_histograms"]
    assert [(part["input"], part["images"]) for part in found] == [(str(photos), 5), (str(plain), 2)]
    lengths = {s.key: len(s.token_ids) for s in read_token_set(tmp_path / "t")}
    for part, folder, count in zip(found, ("imgs", "plain"), (5, 2)):
        own = [length for key, length in lengths.items() if key.startswith(f"{folder}/")]
        assert len(own) == count == sum(part["counts"].values())
        assert part["mean_tokens"] == pytest.approx(np.mean(own))
        assert part["counts"] == {
            str(end): sum(low < length <= end for length in own) for low, end in ((0, 1), (1, 2), (2, 4), (4, 6))
        }
    assert f"{photos}: 5 images" in done.stderr and "      3-4  " in done.stderr and "#" in done.stderr
    alone = v2flow("encode", photos, "-o", tmp_path / "all", "--json", model=model)
    assert json.loads(alone.stdout)["token_histograms"] == []


def test_bins_by_hand(tmp_path):
    for name, row in (("a", [1]), ("b", [1, 2]), ("c", [1, 2, 3]), ("d", range(8)), ("e", range(5))):
        np.save(tmp_path / f"{name}.npy", np.array(row, dtype=np.uint16))
    files = {name: 1 for name in "abcde"}
    manifest = TokenManifest("0" * 16, (32, 32), 64, 8, files, variable_length=True)
    origins = {"a": "x", "b": "x", "c": "x", "d": "y", "e": "y"}
    x, y = length_histograms(tmp_path, manifest, origins)
    assert (x.images, x.mean_tokens, x.counts) == (3, 2.0, {1: 1, 2: 1, 4: 1, 8: 0})
    assert (y.images, y.mean_tokens, y.counts) == (2, 6.5, {1: 0, 2: 0, 4: 0, 8: 2})
    assert list(y.lines())[-1].split() == ["5-8", "2", "#" * 40]


def test_the_search_finds_the_first_good_length():
    class Stub:
        """Decodes to black until image i has its ``needed`` tokens, then to white, which is what was encoded."""

        def decode(self, token_ids, *, lengths, height, width, seeds):
            self.pictures = getattr(self, "pictures", 0) + len(lengths)
            good = torch.tensor(lengths) >= token_ids[:, 0]  # the first id says how many are needed
            return (2.0 * good - 1)[:, None, None, None].expand(-1, 3, height, width)

    stub, needed = Stub(), [1, 2, 3, 7, 64, 100, 255, 256, 999]
    ids = torch.tensor(needed)[:, None].expand(-1, 256)
    found = shortest_prefixes(stub, torch.ones(len(needed), 3, 4, 4), ids, [str(n) for n in needed], 30.0)
    assert found == [*needed[:-1], None]
    assert stub.pictures <= 16 * len(needed)


def test_a_tar_with_different_lengths_round_trip(model, photos, tmp_path):
    shard = CliRunner().invoke(app, ["shard", str(photos), "-o", str(tmp_path / "tars")])
    assert shard.exit_code == 0, shard.output
    loose, packed = tmp_path / "loose", tmp_path / "packed"
    tokenizer, keys, images, whole = encoded(model, photos)
    target = psnr_at(tokenizer, images, whole, keys, 3).median().item()
    for source, out in ((photos, loose), (tmp_path / "tars", packed)):
        v2flow("encode", source, "-o", out, "--max-error", target, model=model)
    ids = {s.key: s.token_ids.tolist() for s in read_token_set(loose)}
    assert len({len(row) for row in ids.values()}) > 1
    assert {s.key: s.token_ids.tolist() for s in read_token_set(packed)} == ids
    done = json.loads(v2flow("decode", packed, "-o", tmp_path / "out", "--json", model=model).stdout)
    assert len(done["images"]) == 5 and not done["failed"]


def test_a_file_of_any_length_without_manifest_decodes(model, tmp_path):
    for length in (1, 3, 6):
        np.save(tmp_path / f"{length}.npy", np.arange(length))
    v2flow("decode", *tmp_path.glob("*.npy"), "-o", tmp_path / "out", model=model)
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {"1.png", "3.png", "6.png"}
    np.save(tmp_path / "7.npy", np.arange(7))
    done = v2flow("decode", tmp_path / "7.npy", "-o", tmp_path / "more", model=model, code=1)
    assert "7 tokens; this tokenizer takes 1 to 6" in done.stderr


@pytest.mark.parametrize("option", [("--tokens", 2), ("--max-error", 99)])
def test_a_file_of_another_length_is_an_error_and_the_others_are_decoded(model, photos, tmp_path, option):
    tokens = tmp_path / "t"
    v2flow("encode", photos, "-o", tokens, *option, model=model)
    np.save(tokens / "0.npy", np.arange(7, dtype=np.uint16))
    np.save(tokens / "1.npy", np.zeros(0, dtype=np.uint16))
    done = v2flow("decode", tokens, "-o", tmp_path / "out", model=model, code=1)
    expected = "expected 2" if option[0] == "--tokens" else "expected at most 6"
    assert f"{tokens / '0.npy'}: 7 tokens an image; {expected}." in done.stderr
    assert f"{tokens / '1.npy'}: shape is (0,); expected (L,) for one image" in done.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 3


def test_zero_tokens_is_a_usage_error(model, photos, tmp_path):
    for command in (("encode", photos, "-o", tmp_path / "t"), ("generate", "a fox", "-o", tmp_path / "t")):
        done = v2flow(*command, "--tokens", 0, model=model, code=2)
        assert "'--tokens': Input should be greater than or equal to 1" in done.stderr and not (tmp_path / "t").exists()


def test_impossible_lengths_are_errors(model, photos, tmp_path, tiny_tokenizer_folder):
    out = tmp_path / "t"
    for option, named in (("--tokens", "--tokens 2"), ("--max-error", "--max-error")):
        done = v2flow("encode", photos, "-o", out, option, 2, model=tiny_tokenizer_folder, code=1)
        assert f"{named}: this tokenizer writes 4 tokens an image" in done.stderr
    assert "has 1 to 6 tokens" in v2flow("encode", photos, "-o", out, "--tokens", 7, model=model, code=1).stderr
    both = v2flow("encode", photos, "-o", out, "--tokens", 2, "--max-error", 9, model=model, code=1)
    assert "use one of them" in both.stderr
    assert not out.exists()
    v2flow("encode", photos, "-o", out, "--tokens", 2, model=model)
    other = v2flow("encode", photos, "-o", out, "--tokens", 3, model=model, code=1)
    assert "holds tokens of tokenizer" in other.stderr


def test_guidance_is_an_option(model, tmp_path):
    np.save(tmp_path / "x.npy", np.arange(3))
    pictures = {}
    for guidance in ("cfg", "apg"):
        v2flow("decode", tmp_path / "x.npy", "-o", tmp_path / guidance, "--guidance", guidance, "--cfg", 4, model=model)
        pictures[guidance] = np.asarray(Image.open(tmp_path / guidance / "x.png")).astype(int)
    assert (pictures["cfg"] != pictures["apg"]).any()
    rounds = v2flow("decode", tmp_path / "x.npy", "-o", tmp_path / "r", "--rounds", 4, model=model, code=1)
    assert "draws all patches at once" in rounds.stderr
