import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from tests.tokenizer.test_seams import build
from v2flow_cli.cli.app import app
from v2flow_cli.jobs.generate import plan_pictures
from v2flow_cli.llm.sample import DrawingLM
from v2flow_cli.llm.sequences import prompt_frame
from v2flow_cli.llm.vocabulary import VisualVocabulary, add_visual_tokens, extend_tables
from v2flow_cli.runtime.device import pick_dtype
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.training.objectives.language_model import train_tokenizer


@pytest.fixture(scope="module")
def llm_args(tiny_tokenizer_folder, tmp_path_factory):
    """Arguments for an untrained LLM that draws tokens of the tiny tokenizer."""
    return untrained_llm(tiny_tokenizer_folder, tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def flexible_args(tmp_path_factory):
    """The same for a tokenizer of 1 to 6 tokens."""
    folder = tmp_path_factory.mktemp("flexible")
    build().save_pretrained(folder / "tokenizer")
    return untrained_llm(folder / "tokenizer", folder / "llm")


def untrained_llm(tokenizer_folder, folder):
    image_tokenizer = V2FlowTokenizer.from_pretrained(tokenizer_folder)
    codes, length = image_tokenizer.config.codebook_size, image_tokenizer.max_tokens
    text_tokenizer = train_tokenizer(["a red fox", "two dogs on a beach"], 300)
    words = len(text_tokenizer)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=words, max_position_embeddings=256, **sizes))
    extend_tables(model, words, codes, None, seed=0)
    vocabulary = VisualVocabulary(
        words,
        codes,
        words + codes,
        words + codes + 1,
        length,
        image_tokenizer.token_digest,
        *prompt_frame(text_tokenizer),
        1,
        flexible=image_tokenizer.flexible,
    )
    model.config.v2flow = vocabulary.record()
    model.save_pretrained(folder)
    add_visual_tokens(text_tokenizer, words, codes).save_pretrained(folder)
    return ["--model", str(folder), "--tokenizer", str(tokenizer_folder)]


def invoke(*arguments):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def test_pictures_have_their_settings_as_metadata(llm_args, tmp_path):
    ran = invoke("a red fox", "狐", *llm_args, "-o", tmp_path / "o", "-n", 2, "--temp", 0.9, "--seed", 5, "--json")
    assert ran.exit_code == 0, ran.output
    printed = json.loads(ran.stdout)
    names = sorted(path.name for path in (tmp_path / "o").iterdir())
    assert names == ["a-red-fox-t0.9-s5.png", "a-red-fox-t0.9-s6.png", "狐-t0.9-s5.png", "狐-t0.9-s6.png"]
    assert [entry["seed"] for entry in printed["images"]] == [5, 6, 5, 6]
    text = Image.open(tmp_path / "o" / "狐-t0.9-s6.png").text
    assert text["v2flow:prompt"] == "狐" and text["v2flow:seed"] == "6" and text["v2flow:temperature"] == "0.9"
    dtype = pick_dtype("auto", torch.device("cpu"))  # the command's, which rounds the weights on some CPUs
    assert text["v2flow:llm_digest"] == DrawingLM.from_pretrained(llm_args[1], dtype=dtype).digest
    assert len(text["v2flow:tokenizer_digest"]) == len(text["v2flow:decoder_digest"]) == 16
    assert "v2flow:solver" not in text  # left to the model


def test_a_picture_does_not_depend_on_its_batch(llm_args, tmp_path):
    common = [*llm_args, "--temp", "1.2", "--save-tokens", "--top-k", 50, "--top-p", 0.99, "--llm-cfg", 2]
    assert invoke("a red fox", "two dogs", *common, "-o", tmp_path / "a", "-n", 3).exit_code == 0
    alone = invoke("two dogs", *common, "-o", tmp_path / "b", "--seed", 2, "--batch-size", 1)
    assert alone.exit_code == 0, alone.output
    name = "two-dogs-t1.2-s2"
    ids = [np.load(tmp_path / side / f"{name}.npy") for side in "ab"]
    assert (ids[0] == ids[1]).all() and ids[0].shape == (4,) and ids[0].dtype == np.uint16
    pixels = [np.asarray(Image.open(tmp_path / side / f"{name}.png")).astype(int) for side in "ab"]
    assert abs(pixels[0] - pixels[1]).max() <= 1
    decoded = CliRunner().invoke(
        app, ["decode", str(tmp_path / "a"), "-o", str(tmp_path / "d"), "--model", llm_args[-1]]
    )
    assert decoded.exit_code == 0, decoded.output  # the saved tokens are a token set as any other
    assert len(list((tmp_path / "d").glob("*.png"))) == 6


def test_several_temperatures_give_a_labelled_grid(llm_args, tmp_path):
    ran = invoke("a red fox", *llm_args, "-o", tmp_path / "o", "--temp", "0.5,0.9,1.3", "--seed", "1,2")
    assert ran.exit_code == 0, ran.output
    assert len(list((tmp_path / "o").glob("*.png"))) == 7
    sheet = Image.open(tmp_path / "o" / "a-red-fox-grid.png")
    single = Image.open(tmp_path / "o" / "a-red-fox-t0.9-s2.png")
    width, height = single.size
    column, row = 90 + width + 4, 56 + height + 4
    assert np.array_equal(np.asarray(sheet.crop((column, row, column + width, row + height))), np.asarray(single))
    assert np.asarray(sheet)[:56].min() < 128  # something is written above


def test_decoder_options_change_the_picture(llm_args, tmp_path):
    pictures = []
    for number, options in enumerate([[], ["--rounds", 1], ["--steps", 5], ["--solver", "heun"], ["--cfg", 4]]):
        out = tmp_path / str(number)
        assert invoke("a red fox", *llm_args, "-o", out, *options).exit_code == 0
        pictures.append(np.asarray(Image.open(out / "a-red-fox-t1-s0.png")).tobytes())
    assert len(set(pictures)) >= 4  # guidance alone may be invisible in an untrained model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([" "], "prompt 1 is empty"),
        (["fox", "  \n"], "prompt 2 is empty"),
        (["x" * 10_000], "beside the image. Use a shorter prompt."),
        (["fox", "--seed", "1,2", "-n", "3"], "use a count with a first seed, or a list of seeds"),
    ],
)
def test_bad_input(llm_args, tmp_path, arguments, message):
    ran = invoke(*arguments, *llm_args, "-o", tmp_path / "o")
    assert ran.exit_code == 1 and message in ran.stderr and not (tmp_path / "o").exists()


def test_the_number_of_tokens_is_an_option(flexible_args, llm_args, tmp_path):
    ids, pictures = {}, []
    for count in (1, 3, 6):
        out = tmp_path / str(count)
        ran = invoke("a red fox", *flexible_args, "-o", out, "--tokens", count, "--save-tokens", "--temp", 0)
        assert ran.exit_code == 0, ran.output
        (file,), (picture,) = out.glob("*.npy"), out.glob("*.png")
        ids[count] = np.load(file).tolist()
        pictures.append(np.asarray(Image.open(picture)).tobytes())
        assert Image.open(picture).text["v2flow:num_tokens"] == str(count)
        decoded = ["decode", str(out), "-o", str(out / "decoded"), "--model", flexible_args[-1]]
        assert CliRunner().invoke(app, decoded).exit_code == 0
    assert len(ids[1]) == 1 and ids[3] == ids[6][:3] and len(set(pictures)) == 3
    refused = (
        (flexible_args, 7, 1, "draws 1 to 6"),
        (flexible_args, 0, 2, "Input should be greater than or equal to 1"),
        (
            llm_args,
            2,
            1,
            "always draws 4; shorter pictures need an LLM that was taught tokens of flexible length",
        ),
    )
    for llm, count, code, message in refused:
        ran = invoke("a red fox", *llm, "-o", tmp_path / "no", "--tokens", count)
        assert ran.exit_code == code and message in ran.stderr and not (tmp_path / "no").exists()
    assert invoke("a red fox", *llm_args, "-o", tmp_path / "whole", "--tokens", 4).exit_code == 0


@pytest.mark.parametrize("option", [["--temp", "hot"], ["--temp", "nan"], ["--seed", "-1"], ["--seed", "1,1"]])
def test_options_that_are_not_numbers(llm_args, tmp_path, option):
    ran = invoke("fox", *option, *llm_args, "-o", tmp_path / "o")
    assert ran.exit_code == 2 and f"{option[1]}: expected different numbers from 0 on" in ran.stderr
    assert option[0] in ran.stderr and not (tmp_path / "o").exists()


def test_an_empty_argument_is_a_usage_error(llm_args, tmp_path):
    ran = invoke("fox", "", *llm_args, "-o", tmp_path / "o")
    assert ran.exit_code == 2 and "empty argument, such as from a variable that is not set" in ran.stderr
    assert not (tmp_path / "o").exists()


def test_refuses_to_overwrite_and_foreign_models(llm_args, tmp_path, tiny_tokenizer_folder):
    out = tmp_path / "o"
    assert invoke("fox", *llm_args, "-o", out).exit_code == 0
    again = invoke("fox", *llm_args, "-o", out)
    assert again.exit_code == 1 and "exists already" in again.stderr
    assert invoke("fox", *llm_args, "-o", out, "--force").exit_code == 0

    other = V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder)
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    other.save_pretrained(tmp_path / "other")
    ran = invoke("fox", *llm_args[:2], "--tokenizer", tmp_path / "other", "-o", tmp_path / "p")
    assert ran.exit_code == 1 and "draws tokens of tokenizer" in ran.stderr
    ran = invoke("fox", "--model", tiny_tokenizer_folder, *llm_args[2:], "-o", tmp_path / "p")
    assert (
        ran.exit_code == 1 and "a model of type v2flow, for which transformers has no text-only causal LM" in ran.stderr
    )


def test_case_28_one_picture_under_the_given_file_name(llm_args, tmp_path):
    ran = invoke("a red fox", *llm_args, "-o", tmp_path / "fox.png")
    assert ran.exit_code == 0 and ran.stdout.strip() == str(tmp_path / "fox.png")
    assert Image.open(tmp_path / "fox.png").info["v2flow:prompt"] == "a red fox"
    again = invoke("a red fox", *llm_args, "-o", tmp_path / "fox.png")
    assert again.exit_code == 1 and "exists already" in again.stderr
    two = invoke("a red fox", "a cat", *llm_args, "-o", tmp_path / "two.png")
    assert two.exit_code == 1 and "the name of one picture, but there are 2" in two.stderr
    assert [path.name for path in tmp_path.glob("*.png")] == ["fox.png"]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "generated.jsonl").read_text().splitlines()]


def test_a_file_of_prompts_is_drawn_once_and_resumed(llm_args, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "o"
    prompts.write_text("a red fox\n\n two  dogs \nA red fox!\n", encoding="utf-8")
    common = ["--prompts", prompts, *llm_args, "-o", out, "-n", 2, "--save-tokens"]
    ran = invoke(*common)
    assert ran.exit_code == 0, ran.output
    names = [f"{p}-t1-s{s}.png" for p in ("a-red-fox", "two-dogs", "a-red-fox-3") for s in (0, 1)]
    assert [line["path"] for line in lines_of(out)] == names
    assert lines_of(out)[2]["prompt"] == "two dogs" and len(lines_of(out)[2]["tokenizer_digest"]) == 16
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    (out / names[3]).unlink()
    with (out / "generated.jsonl").open("a") as file:
        file.write('{"path": "half a li')  # as a killed run leaves it
    again = invoke(*common, "--json")
    assert again.exit_code == 0, again.output
    assert "5 of 6 pictures exist already" in again.stderr
    assert [entry["kept"] for entry in json.loads(again.stdout)["images"]] == [True, True, True, False, True, True]
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert {name for name in after if after[name] != before[name]} == {names[3]}
    assert [line["path"] for line in lines_of(out)] == names
    other = invoke(*common, "--temp", "1.0", "--llm-cfg", 3)
    assert other.exit_code == 1 and "exists, drawn with llm_guidance_scale 1.0" in other.stderr


def test_prompts_come_from_one_place(llm_args, tmp_path):
    assert invoke(*llm_args).exit_code == 2
    (tmp_path / "p.txt").write_text("\n")
    assert invoke("fox", "--prompts", tmp_path / "p.txt", *llm_args).exit_code == 2
    ran = invoke("--prompts", tmp_path / "p.txt", *llm_args)
    assert ran.exit_code == 1 and "no prompt in it" in ran.stderr
    ran = invoke("--prompts", tmp_path / "none.txt", *llm_args)
    assert ran.exit_code == 1 and "cannot be read as UTF-8 text" in ran.stderr


def test_file_names_differ_whatever_the_prompts():
    prompts = ["a dog 3", "a dog", "A dog", "a dog!", "\u2603", "?"]
    names = [p.name for p in plan_pictures(prompts, [0], [1.0])]
    assert len(set(names)) == len(prompts)


def test_captions_need_an_llm_trained_on_image_to_text(llm_args, tmp_path, sample_images):
    sample_images[0].save(tmp_path / "photo.png")
    ran = invoke("--from-image", tmp_path / "photo.png", *llm_args)
    assert ran.exit_code == 1 and "was not trained to caption" in ran.stderr
    folder = tmp_path / "llm"
    shutil.copytree(llm_args[1], folder)
    config = json.loads((folder / "config.json").read_text())
    config["v2flow"]["captions"] = True
    (folder / "config.json").write_text(json.dumps(config))
    caption_args = ["--from-image", tmp_path / "photo.png", "--model", folder, *llm_args[2:]]
    ran = invoke(*caption_args, "--json", "--temp", "0,1.5", "--seed", "3")
    assert ran.exit_code == 0, ran.output
    listed = json.loads(ran.stdout)["captions"]
    assert [(c["temperature"], c["seed"]) for c in listed] == [(0.0, 3), (1.5, 3)]
    assert all("v2flow" not in c["caption"] for c in listed)
    assert json.loads(invoke(*caption_args, "--json", "--temp", "0,1.5", "--seed", "3").stdout)["captions"] == listed
