import itertools
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from v2flow_cli.errors import DataError, TokenFileError
from v2flow_cli.llm.pairs import Part, Samples, check_data, count_tokens
from v2flow_cli.recipe.schema import TokenPairs
from v2flow_cli.store.token_manifest import TokenManifest

DIGEST = "0123456789abcdef"


def pairs(folder, **changes):
    fields = dict(caption_dropout=0.0, max_caption_tokens=8, train_on_prompt=False, held_out_share=0.0)
    return TokenPairs(**(dict(token_sets=(str(folder),)) | fields | dict(shuffle_window=5) | changes))


def first(samples, count):
    return [s["input_ids"].tolist() for s in itertools.islice(samples, count)]


def test_stream_is_shuffled_complete_and_repeatable(text_tokenizer, vocabulary, tmp_path, token_set):
    ids = token_set(tmp_path)
    data = pairs(tmp_path, max_caption_tokens=40)
    samples = Samples(data, text_tokenizer, vocabulary, seed=3)
    three_passes = first(samples, 36)
    assert first(samples, 36) == three_passes
    pictures = [tuple(i - 300 for i in s if 300 <= i < 364) for s in three_passes]
    expected = sorted(map(tuple, ids.tolist()))
    for start in (0, 12, 24):
        assert sorted(pictures[start : start + 12]) == expected
    assert pictures[:12] != pictures[12:24] and pictures[:12] != [tuple(row) for row in ids.tolist()]
    captions = {text_tokenizer.decode([i for i in s if 9 < i < 300]) for s in three_passes}
    assert len(captions) > 12  # in three passes some image shows both of its captions
    assert first(Samples(data, text_tokenizer, vocabulary, seed=4), 36) != three_passes


def test_caption_dropout_leaves_the_empty_prompt(text_tokenizer, vocabulary, tmp_path, token_set):
    token_set(tmp_path)
    samples = Samples(pairs(tmp_path, caption_dropout=0.5), text_tokenizer, vocabulary, seed=0)
    empty = sum(s[:3] == [0, 9, 364] for s in first(samples, 400))
    assert 150 < empty < 250


def test_held_out_images_are_never_trained_on(text_tokenizer, vocabulary, tmp_path, token_set):
    ids = token_set(tmp_path, images=40)
    data = pairs(tmp_path, held_out_share=0.3)
    held = first(Samples(data, text_tokenizer, vocabulary, 0, held_out=True), 100)
    trained = first(Samples(data, text_tokenizer, vocabulary, 0), 40 - len(held))
    pictures = [{tuple(i - 300 for i in s if 300 <= i < 364) for s in part} for part in (held, trained)]
    assert 0 < len(held) < 40 and not pictures[0] & pictures[1]
    assert pictures[0] | pictures[1] == set(map(tuple, ids.tolist()))


def test_data_without_a_training_image_is_an_error(text_tokenizer, vocabulary, tmp_path, token_set):
    token_set(tmp_path, images=1)
    samples = Samples(pairs(tmp_path, held_out_share=0.999999), text_tokenizer, vocabulary, seed=0)
    with pytest.raises(DataError, match="no image to train on"):
        next(iter(samples))


class ImageTokenizer:
    """What ``check_data`` asks an image tokenizer for."""

    token_digest = DIGEST

    config = SimpleNamespace(image_size=256)

    def __init__(self, flexible=False, max_tokens=4, others=()):
        self.flexible, self.possible = flexible, (max_tokens, *others)

    def lengths(self, height, width):
        return self.possible


def test_token_sets_must_belong_together(tmp_path, token_set):
    for name, length, digest in (("a", 4, DIGEST), ("b", 6, DIGEST), ("c", 4, "f" * 16)):
        token_set(tmp_path / name, length=length, digest=digest)

    def check(*names, tokenizer=ImageTokenizer(), **changes):  # noqa: B008
        return check_data(pairs("", token_sets=tuple(str(tmp_path / n) for n in names), **changes), tokenizer)

    assert check("a") == (4, 12)
    with pytest.raises(DataError, match=r"one number of tokens an image.*a: 4.*b: 6"):
        check("a", "b")
    with pytest.raises(TokenFileError, match="encoded by tokenizer ffff"):
        check("a", "c")
    with pytest.raises(TokenFileError, match="no token manifest"):
        check(".")
    assert check("a", "b", tokenizer=ImageTokenizer(flexible=True, max_tokens=8), lengths=(1, 4)) == (6, 24)
    with pytest.raises(DataError, match=r"data\.lengths is \[1, 9\], but the image tokenizer takes 1 to 4"):
        check("a", tokenizer=ImageTokenizer(flexible=True), lengths=(1, 9))
    with pytest.raises(DataError, match="has exactly 4 an image"):
        check("a", lengths=(2,))
    assert check("a", lengths=(4,)) == (4, 12)
    token_set(tmp_path / "d")
    manifest = TokenManifest.load(tmp_path / "d")
    replace(manifest, refine_steps=20, refined_by="0" * 16).save(tmp_path / "d")
    assert check("d") == (4, 12)
    with pytest.raises(DataError, match=r"ids of .*a are refined in 0 steps, those of .*d in 20"):
        check("a", "d")


def test_photos_are_encoded_at_one_of_the_lengths_of_a_tokenizer(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    photos = pairs("", token_sets=(), photos=(str(tmp_path),), lengths=(2,))
    assert check_data(photos, ImageTokenizer(others=(2,))) == (2, 1)
    with pytest.raises(DataError, match=r"data\.lengths is \[2\], but the image tokenizer has exactly 3 or 4 an image"):
        check_data(photos, ImageTokenizer(others=(3,)))


def test_processes_share_one_order(text_tokenizer, vocabulary, tmp_path, token_set):
    token_set(tmp_path)
    samples = Samples(pairs(tmp_path), text_tokenizer, vocabulary, seed=0)
    whole = first(samples, 24)
    halves = []
    for rank in (0, 1):
        samples.part = Part(start=4, batch=2, rank=rank, ranks=2)
        halves.append(first(samples, 10))
    assert halves[0][:4] == whole[4:6] + whole[8:10] and halves[1][:4] == whole[6:8] + whole[10:12]
    batches = zip(*(iter([half[i : i + 2] for i in range(0, 10, 2)]) for half in halves))
    assert [s for both in batches for batch in both for s in batch] == whole[4:24]


def test_image_to_text_and_lengths_by_share(text_tokenizer, vocabulary, tmp_path, token_set):
    token_set(tmp_path)
    data = pairs(tmp_path, image_to_text_share=0.5, lengths=(1, 3))
    made = first(Samples(data, text_tokenizer, replace(vocabulary, flexible=True), seed=0), 400)
    to_text = [s for s in made if s[1] == 364]
    assert 150 < len(to_text) < 250
    assert {sum(300 <= i < 364 for i in s) for s in made} == {1, 3}
    token_set(tmp_path, captions=0)
    assert all(s[1:3] == [9, 364] for s in first(Samples(data, text_tokenizer, vocabulary, seed=0), 20))


def test_prefixes_of_random_length_end_only_where_the_picture_does(text_tokenizer, vocabulary, tmp_path, token_set):
    token_set(tmp_path)
    flexible = replace(vocabulary, flexible=True)
    for kind, lengths in (("uniform", {1, 2, 3, 4}), ("power_of_two", {1, 2, 4})):
        made = first(Samples(pairs(tmp_path, prefix_lengths=kind), text_tokenizer, flexible, seed=0), 400)
        counts = [sum(300 <= i < 364 for i in s) for s in made]
        assert set(counts) == lengths
        assert all(counts.count(length) > 0.7 * 400 / len(lengths) for length in lengths)
        assert all((365 in s) == (count == 4) for s, count in zip(made, counts))
    held = pairs(tmp_path, prefix_lengths="uniform", held_out_share=0.9)
    whole = first(Samples(held, text_tokenizer, flexible, seed=0, held_out=True), 100)
    assert {sum(300 <= i < 364 for i in s) for s in whole} == {4}


@pytest.mark.parametrize("setting", [{"prefix_lengths": "uniform"}, {"lengths": tuple(range(1, 17))}])
def test_the_images_of_a_step_share_their_length(text_tokenizer, vocabulary, tmp_path, token_set, setting):
    """A step is then as wide as its length; passes of 12 images do not begin where steps do."""
    token_set(tmp_path, length=16)
    flexible = replace(vocabulary, flexible=True, tokens_per_image=16)
    data = pairs(tmp_path, **setting)
    samples = Samples(data, text_tokenizer, flexible, seed=0, step_size=8)
    counts = [sum(300 <= i < 364 for i in s) for s in first(samples, 400)]
    steps = [set(counts[i : i + 8]) for i in range(0, 400, 8)]
    assert all(len(step) == 1 for step in steps)
    assert len(set(counts)) > 10
    samples.part = Part(start=16, batch=4, rank=1, ranks=2)
    assert [sum(300 <= i < 364 for i in s) for s in first(samples, 8)] == [*counts[20:24], *counts[28:32]]


def test_prefixes_need_a_tokenizer_of_flexible_length(tmp_path, token_set):
    token_set(tmp_path)
    data = pairs(tmp_path, prefix_lengths="uniform")
    assert check_data(data, ImageTokenizer(flexible=True)) == (4, 12)
    with pytest.raises(DataError, match="prefix_lengths is uniform, but the image tokenizer has exactly 4 tokens"):
        check_data(data, ImageTokenizer())


def test_noise_and_labels_by_share(text_tokenizer, vocabulary, tmp_path, token_set):
    token_set(tmp_path, length=16)
    data = pairs(tmp_path, token_noise=0.8, label_share=0.25, image_to_text_share=0.2)
    samples = Samples(data, text_tokenizer, replace(vocabulary, tokens_per_image=16), seed=0)
    made = list(itertools.islice(samples, 600))
    drawn = [s for s in made if s["input_ids"][-2] == 365]
    labels = np.stack([s["labels"][-18:-2] for s in drawn])
    read = np.stack([s["input_ids"][-18:-2] for s in drawn])
    assert 0.22 < (labels != -100).mean() < 0.28
    noisy = (labels != read)[labels != -100].mean()
    assert 0.35 < noisy < 0.43  # 0.8 / 2, less the chance of the same id
    assert all((s["labels"][-2:] == torch.tensor([365, 1])).all() for s in drawn)
    again = list(itertools.islice(samples, 600))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(made, again))
    held = Samples(replace(data, held_out_share=0.9), text_tokenizer, vocabulary, seed=0, held_out=True)
    assert all((s["labels"][-18:-2] == s["input_ids"][-18:-2]).all() for s in held)


def test_counts_of_the_unigram_model(tmp_path, token_set):
    ids = token_set(tmp_path, images=3)
    assert (count_tokens(pairs(tmp_path), 64) == np.bincount(ids.flatten(), minlength=64)).all()


def test_photos_are_encoded_on_the_fly(text_tokenizer, vocabulary, tmp_path, tiny_tokenizer):
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    data = pairs("", token_sets=(), photos=(str(tmp_path),))
    assert check_data(data, tiny_tokenizer) == (4, 5)
    vocabulary = replace(vocabulary, tokenizer_digest=tiny_tokenizer.token_digest)
    samples = Samples(data, text_tokenizer, vocabulary, seed=0, image_tokenizer=tiny_tokenizer)
    two_passes = first(samples, 10)
    assert sorted(two_passes[:5]) == sorted(two_passes[5:]) and len({tuple(s) for s in two_passes}) == 5
    processor = tiny_tokenizer.image_processor
    (pixels,) = processor.preprocess([Image.open(tmp_path / "3.png").convert("RGB")])["pixel_values"]
    ids = tiny_tokenizer.encode(pixels[None])[0].tolist()
    caption = text_tokenizer("number 3")["input_ids"]
    assert [0, *caption, 9, 364, *(i + 300 for i in ids), 365, 1] in two_passes
    samples.part = Part(start=6, batch=2)
    assert first(samples, 4) == two_passes[6:]
    (tmp_path / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"0\.png.*not an image"):
        first(samples, 10)


def test_a_picture_in_memory_takes_little_more_than_its_ids(text_tokenizer, vocabulary, tmp_path, token_set):
    def traced(images):
        """Bytes that stay after a pass over so many pictures of 256 ids of one byte, all in the window."""
        token_set(tmp_path / str(images), images=images, length=256, captions=1)
        data = pairs(tmp_path / str(images), shuffle_window=1000)
        samples = Samples(data, text_tokenizer, vocabulary, seed=0)
        tracemalloc.start()
        try:
            stream = iter(samples)
            for _ in itertools.islice(stream, images + 1):
                pass
            return tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()

    traced(20)  # what Python stores on a first use
    assert (traced(420) - traced(20)) / 400 < 256 + 600
