import itertools

import numpy as np
import pytest

from v2flow_cli.errors import DataError, ModelError, TokenFileError
from v2flow_cli.llm.sequences import Samples, check_token_sets, collate, prompt_frame
from v2flow_cli.recipe.schema import TokenPairs

DIGEST = "0123456789abcdef"


def pairs(folder, **changes):
    fields = dict(caption_dropout=0.0, max_caption_tokens=8, train_on_prompt=False, held_out_share=0.0)
    return TokenPairs(token_sets=(str(folder),), **(fields | dict(shuffle_window=5) | changes))


def first(samples, count):
    return [s["input_ids"].tolist() for s in itertools.islice(samples, count)]


def test_labels_by_hand(text_tokenizer, vocabulary, tmp_path, token_set):
    fox = text_tokenizer(" fox")["input_ids"]
    caption = text_tokenizer("A red fox")["input_ids"]
    assert caption[-len(fox) :] == fox
    samples = Samples(pairs(tmp_path), text_tokenizer, vocabulary, seed=0)
    sample = samples.sample("A  red fox ", np.array([7, 0, 63, 7]))
    answer = [307, 300, 363, 307, 365, 1]  # four visual ids, end of image, EOS
    prompt = [0, *caption, 9, 364]  # BOS, the caption, the template's suffix, begin of image
    assert sample["input_ids"].tolist() == prompt + answer
    assert sample["labels"].tolist() == [-100] * len(prompt) + answer
    whole = Samples(pairs(tmp_path, train_on_prompt=True), text_tokenizer, vocabulary, seed=0)
    assert whole.sample("A red fox", np.array([7, 0, 63, 7]))["labels"].tolist() == prompt + answer
    long = samples.sample("A red fox " * 50, np.array([7, 0, 63, 7]))
    assert len(long["input_ids"]) == 1 + 8 + 2 + 6  # max_caption_tokens is 8


def test_batches_are_padded_on_the_right(text_tokenizer, vocabulary, tmp_path, token_set):
    samples = Samples(pairs(tmp_path), text_tokenizer, vocabulary, seed=0)
    batch = collate([samples.sample("", np.arange(4)), samples.sample("A", np.arange(4))], pad_id=2)
    assert batch["input_ids"][0].tolist()[-1] == 2 and batch["labels"][0].tolist()[-1] == -100
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 10)


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


def test_nothing_left_to_train_on(text_tokenizer, vocabulary, tmp_path, token_set):
    token_set(tmp_path, images=1)
    samples = Samples(pairs(tmp_path, held_out_share=0.999999), text_tokenizer, vocabulary, seed=0)
    with pytest.raises(DataError, match="no image to train on"):
        next(iter(samples))


def test_one_bos_with_and_without_template(text_tokenizer):
    prefix, suffix = prompt_frame(text_tokenizer)
    newline = text_tokenizer("\n")["input_ids"]
    assert prefix == (0,) and list(suffix) == newline
    plain = text_tokenizer.__class__(tokenizer_object=text_tokenizer.backend_tokenizer, bos_token="<|bos|>")
    assert prompt_frame(plain) == ((), ())  # neither template nor tokenizer writes a BOS
    plain.chat_template = "{{ 'Hello' }}"
    with pytest.raises(ModelError, match="does not repeat"):
        prompt_frame(plain)


def test_token_sets_must_belong_together(tmp_path, token_set):
    for name, length, digest in (("a", 4, DIGEST), ("b", 6, DIGEST), ("c", 4, "f" * 16)):
        token_set(tmp_path / name, length=length, digest=digest)
    a, b, c = (str(tmp_path / n) for n in "abc")
    assert check_token_sets([a], DIGEST) == (4, 12)
    with pytest.raises(DataError, match=r"one number of tokens an image.*a: 4.*b: 6"):
        check_token_sets([a, b], DIGEST)
    with pytest.raises(TokenFileError, match="made by tokenizer ffff"):
        check_token_sets([a, c], DIGEST)
    with pytest.raises(TokenFileError, match="no token manifest"):
        check_token_sets([str(tmp_path)], DIGEST)
