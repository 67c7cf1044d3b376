import numpy as np
import pytest

from v2flow_cli.errors import ModelError
from v2flow_cli.llm.sequences import caption_ids, collate, prompt_frame, sample


def test_labels_by_hand(text_tokenizer, vocabulary):
    fox = text_tokenizer(" fox")["input_ids"]
    caption = text_tokenizer("A red fox")["input_ids"]
    assert caption[-len(fox) :] == fox
    words = caption_ids(text_tokenizer, "A  red fox ")
    ids = np.array([7, 0, 63, 7])
    made = sample(vocabulary, words, ids)
    answer = [307, 300, 363, 307, 365, 1]  # four visual ids, end of image, EOS
    prompt = [0, *caption, 9, 364]  # BOS, the caption, the template's suffix, begin of image
    assert made["input_ids"].tolist() == prompt + answer
    assert made["labels"].tolist() == [-100] * len(prompt) + answer
    assert sample(vocabulary, words, ids, train_on_prompt=True)["labels"].tolist() == prompt + answer


def test_a_picture_that_has_not_ended_has_no_end_mark(text_tokenizer, vocabulary):
    words, ids = caption_ids(text_tokenizer, "fox"), np.array([7, 0])
    whole, cut = (sample(vocabulary, words, ids, ended=ended) for ended in (True, False))
    assert whole["labels"].tolist()[-4:] == [307, 300, 365, 1]
    assert cut["labels"].tolist() == whole["labels"].tolist()[:-2]
    assert cut["input_ids"].tolist() == whole["input_ids"].tolist()[:-2]


def test_noise_changes_inputs_and_not_labels(text_tokenizer, vocabulary):
    words, ids = caption_ids(text_tokenizer, "fox"), np.array([7, 0, 63, 7])
    plain = sample(vocabulary, words, ids)
    made = sample(
        vocabulary, words, ids, read_ids=np.array([7, 5, 63, 6]), label_mask=np.array([True, True, False, True])
    )
    assert made["input_ids"].tolist()[-6:] == [307, 305, 363, 306, 365, 1]
    assert made["labels"].tolist()[-6:] == [307, 300, -100, 307, 365, 1]
    assert made["labels"].tolist()[:-6] == plain["labels"].tolist()[:-6] == [-100] * (len(plain["labels"]) - 6)
    assert made["input_ids"].tolist()[:-6] == plain["input_ids"].tolist()[:-6]


def test_image_to_text_by_hand(text_tokenizer, vocabulary):
    caption = text_tokenizer("A red fox")["input_ids"]
    made = sample(vocabulary, caption, np.array([7, 0, 63, 7]), to_text=True)
    prompt = [0, 364, 307, 300, 363, 307, 365, 9]  # BOS, the image between its marks, the template's suffix
    assert made["input_ids"].tolist() == [*prompt, *caption, 1]
    assert made["labels"].tolist() == [-100] * 8 + [*caption, 1]


def test_batches_are_padded_on_the_right(text_tokenizer, vocabulary):
    words = caption_ids(text_tokenizer, "A")
    samples = [{**sample(vocabulary, w, np.arange(4)), "key": f"photo-{len(w)}"} for w in ([], words)]
    batch = collate(samples, pad_id=2)
    assert batch["keys"] == ["photo-0", f"photo-{len(words)}"]
    assert batch["input_ids"][0].tolist()[-1] == 2 and batch["labels"][0].tolist()[-1] == -100
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 10)


def test_one_bos_with_and_without_template(text_tokenizer):
    prefix, suffix = prompt_frame(text_tokenizer)
    newline = text_tokenizer("\n")["input_ids"]
    assert prefix == (0,) and list(suffix) == newline
    plain = text_tokenizer.__class__(tokenizer_object=text_tokenizer.backend_tokenizer, bos_token="<|bos|>")
    assert prompt_frame(plain) == ((), ())  # neither template nor tokenizer writes a BOS
    plain.chat_template = "{{ 'Hello' }}"
    with pytest.raises(ModelError, match="text 0 times"):
        prompt_frame(plain)
