"""Kind 4: other people's models and libraries. An LLM draws after fine-tuning, or is refused before it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from v2flow_cli.cli.app import app
from v2flow_cli.llm.sample import DrawingLM

from ..conftest import RECIPES
from ..llm.conftest import SENTENCES, SIZES, write_token_set

TEMPLATES = {
    "raises": ("{{ raise_exception('System role is required') }}", "System role is required"),
    "malformed": ("{% for message in messages %}{{ message['content'] }}", "end of template"),
    "undefined": ("{{ messages[7]['content'] }}", "list object has no element 7"),
    "drops the words": ("{{ bos_token }}", "repeats the user's text 0 times"),
    "changes the words": ("{{ messages[0]['content'] | lower }}", "repeats the user's text 0 times"),
    "doubles the words": ("{{ messages[0]['content'] }} {{ messages[0]['content'] }}", "the user's text 2 times"),
    "named, no default": ({"rag": "{{ messages }}", "tool_use": "{{ messages }}"}, "no default specified"),
}


@pytest.fixture(scope="module")
def text_tokenizer():
    from v2flow_cli.training.objectives.language_model import train_tokenizer

    return train_tokenizer(SENTENCES * 3, 300)


@pytest.fixture
def llm(tmp_path, text_tokenizer):
    """``llm(model, tokenizer)`` saves an LLM's folder; without arguments, a llama of as many rows as words."""

    def save(model=None, tokenizer=text_tokenizer):
        torch.manual_seed(0)
        folder = tmp_path / "llm"
        shutil.rmtree(folder, ignore_errors=True)
        (model or LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES))).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def finetune(tmp_path, tiny_tokenizer_folder):
    """``finetune("--set", ...)``: the command on 12 images of 4 tokens, two steps; output in ``tmp_path``/out."""
    from v2flow_cli.tokenizer import V2FlowTokenizer

    digest = V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder).token_digest
    write_token_set(tmp_path / "tokens", digest=digest)

    def run(*arguments):
        settings = [f"llm={tmp_path / 'llm'}", f"tokenizer={tiny_tokenizer_folder}", f"output={tmp_path / 'out'}"]
        settings += [f"data.token_sets=[{tmp_path / 'tokens'}]", "train.steps=2", "train.save_every=2"]
        options = [part for setting in settings for part in ("--set", setting)]
        done = CliRunner().invoke(app, ["finetune-llm", str(RECIPES / "tiny/llm.yaml"), *options, *arguments])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done

    return run


def refused(finetune, tmp_path, reason):
    for arguments in (["--dry-run"], []):
        done = finetune(*arguments)
        assert done.exit_code == 1 and done.stdout == "", done.output
        (said,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
        assert reason in said and done.stderr.endswith(f"{said}\n")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def drawn(tmp_path):
    """The LLM after a training, which has drawn two prompts of different lengths; each as it would have alone."""
    actor = DrawingLM.from_pretrained(tmp_path / "out")
    prompts = ["a red fox", "two dogs play on a beach near the water"]
    together = actor.generate(prompts, temperature=0.0)
    assert together.shape == (2, 4) and 0 <= together.min() <= together.max() < 64
    assert torch.equal(together, torch.cat([actor.generate(prompt, temperature=0.0) for prompt in prompts]))
    return actor


@pytest.mark.parametrize("mode", ["full", "rows", "lora"])
def test_case_18_words_beyond_the_table(finetune, llm, tmp_path, text_tokenizer, mode):
    """A chat model's tokens, added to its tokenizer and not to its table: they were visual tokens 0 and 1."""
    tokenizer = AutoTokenizer.from_pretrained(llm())
    assert tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True) == 2
    tokenizer.chat_template = "<|im_start|>{{ messages[0]['content'] }}<|im_end|>"
    rows = len(text_tokenizer)
    llm(LlamaForCausalLM(LlamaConfig(vocab_size=rows, **SIZES)), tokenizer)
    lora = ["--set", "lora={rank: 2, alpha: 4, dropout: 0}"] if mode == "lora" else []
    done = finetune("--set", f"mode={mode}", *lora)
    assert done.exit_code == 0, done.stderr
    assert "2 for words of the tokenizer without a row" in done.stderr
    actor = drawn(tmp_path)
    assert actor.vocabulary.visual_token_offset == rows + 2
    assert actor.vocabulary.prompt_prefix == (rows,) and actor.vocabulary.prompt_suffix == (rows + 1,)
    names = actor.text_tokenizer.convert_ids_to_tokens([rows, rows + 1, rows + 2, rows + 65, rows + 66])
    assert names == ["<|im_start|>", "<|im_end|>", "<|v2flow:v_0|>", "<|v2flow:v_63|>", "<|v2flow:boi|>"]
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / n).get_input_embeddings() for n in ("llm", "out"))
    assert len(after.weight) == rows + 2 + 66
    if mode != "full":
        assert torch.equal(after.weight[:rows], before.weight)


def test_case_18_an_id_far_beyond_the_table(finetune, llm, tmp_path):
    folder = llm()
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["added_tokens"].append({**tree["added_tokens"][0], "id": 400, "content": "<|far|>"})
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    far = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|far|>")
    assert finetune().exit_code == 0
    assert drawn(tmp_path).vocabulary.visual_token_offset == far + 1 > len(AutoTokenizer.from_pretrained(folder)) - 1


@pytest.mark.parametrize("kind", TEMPLATES)
def test_case_19_chat_templates(finetune, llm, tmp_path, text_tokenizer, kind):
    template, reason = TEMPLATES[kind]
    tokenizer = AutoTokenizer.from_pretrained(llm())
    tokenizer.chat_template = template
    llm(tokenizer=tokenizer)
    refused(finetune, tmp_path, reason)


def test_case_19_named_templates_with_a_default(finetune, llm, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(llm())
    tokenizer.chat_template = {"default": "{{ bos_token }}{{ messages[0]['content'] }}", "rag": "{{ nonsense( }}"}
    llm(tokenizer=tokenizer)
    assert finetune().exit_code == 0 and drawn(tmp_path)


def test_case_20_bloom(finetune, llm, tmp_path, text_tokenizer):
    """ALiBi counts the slots of a static cache as positions; a growing one draws."""
    config = CONFIG_MAPPING["bloom"](hidden_size=32, n_layer=2, n_head=4, vocab_size=len(text_tokenizer))
    llm(AutoModelForCausalLM.from_config(config))
    assert finetune("--dry-run").exit_code == 0
    assert finetune().exit_code == 0
    assert drawn(tmp_path).vocabulary.cache == "dynamic"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["v2flow"]["cache"] = "static"  # as an earlier version left it
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    folder = str(tmp_path / "out")
    done = CliRunner().invoke(app, ["generate", "a fox", "--model", folder, "-o", str(tmp_path / "png")])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("mamba", dict(hidden_size=32, num_hidden_layers=2), "cannot draw token by token"),
        (
            "bert",
            dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
            "likely tokens differ",
        ),
        ("bart", dict(d_model=32, encoder_layers=1, decoder_layers=1, decoder_attention_heads=4), "encoder-decoder"),
    ],
)
def test_architectures_that_cannot_draw_are_refused(finetune, llm, tmp_path, text_tokenizer, kind, settings, reason):
    config = CONFIG_MAPPING[kind](vocab_size=len(text_tokenizer), **settings)
    llm(AutoModelForCausalLM.from_config(config))
    if kind == "bart":  # which a causal LM's folder does not say of itself
        tree = json.loads((tmp_path / "llm" / "config.json").read_text())
        (tmp_path / "llm" / "config.json").write_text(json.dumps(tree | {"is_encoder_decoder": True}))
    refused(finetune, tmp_path, reason)


def sentencepiece_like():
    words = Tokenizer(models.Unigram([("<unk>", 0.0), *((c, -1.0) for c in "abcdefghijklmnopqrstuvwxyz ")], unk_id=0))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def names_split_at_spaces():
    """BPE that takes a whole word of its vocabulary as it is, and splits at spaces alone: names would be tokens."""
    words = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("abcdef<|>:_")}, merges=[], ignore_merges=True))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def test_text_tokenizers_that_cannot_be_extended(finetune, llm, tmp_path):
    llm(tokenizer=sentencepiece_like())
    refused(finetune, tmp_path, "of type Unigram; v2flow extends only BPE")
    llm(tokenizer=names_split_at_spaces())
    refused(finetune, tmp_path, "would read the name of a visual token in a caption")


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json", "model.safetensors", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe rubbish"])
def test_damaged_folders(finetune, llm, tmp_path, file, content):
    (llm() / file).write_bytes(content)
    done = finetune()
    assert done.exit_code == 1 and f"error: llm {tmp_path / 'llm'}: cannot be loaded as a causal LM" in done.stderr


def test_without_special_tokens(finetune, llm, tmp_path, text_tokenizer):
    """Neither BOS nor EOS nor padding, and no chat template: the caption alone is the prompt, and an image ends it."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=text_tokenizer.backend_tokenizer)
    assert tokenizer.eos_token_id is tokenizer.pad_token_id is tokenizer.bos_token_id is None
    llm(tokenizer=tokenizer)
    assert finetune("--set", "data.image_to_text_share=0.5").exit_code == 0
    actor = drawn(tmp_path)
    assert actor.vocabulary.eos_id is None and actor.vocabulary.prompt_prefix == actor.vocabulary.prompt_suffix == ()
    assert isinstance(actor.caption(torch.tensor([1, 2, 3, 4]), max_tokens=5), str)


@pytest.mark.parametrize("tied", [True, False])
def test_half_precision_and_tables_of_odd_sizes(finetune, llm, tmp_path, text_tokenizer, tied):
    config = LlamaConfig(vocab_size=len(text_tokenizer) + 7, tie_word_embeddings=tied, **SIZES)
    model = LlamaForCausalLM(config).half()
    llm(model)
    assert finetune().exit_code == 0
    assert drawn(tmp_path).vocabulary.visual_token_offset == len(text_tokenizer) + 7


def test_a_multimodal_model(finetune, llm, tmp_path, text_tokenizer):
    """Its config has neither words nor layers nor positions at the top level."""
    eyes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=28)
    words = {**SIZES, "vocab_size": len(text_tokenizer), "head_dim": 8, "sliding_window": 8}
    config = CONFIG_MAPPING["gemma3"](text_config=words, vision_config=eyes, image_token_index=5, mm_tokens_per_image=4)
    llm(AutoModelForCausalLM.from_config(config))
    dry = finetune("--dry-run", "--json")
    assert dry.exit_code == 0 and json.loads(dry.stdout)["parameters"] > 0, dry.stderr
    assert finetune().exit_code == 0
    assert drawn(tmp_path).vocabulary.visual_token_offset == len(text_tokenizer)


@pytest.mark.parametrize(("positions", "fits"), [(20, False), (30, True)])
def test_few_positions(finetune, llm, tmp_path, text_tokenizer, positions, fits):
    """16 tokens of caption, 4 of image, and 6 of template, marks and EOS; checked by --dry-run too."""
    sizes = SIZES | {"max_position_embeddings": positions}
    llm(LlamaForCausalLM(LlamaConfig(vocab_size=len(text_tokenizer), **sizes)))
    if fits:
        assert finetune("--dry-run").exit_code == 0
    else:
        refused(finetune, tmp_path, f"but the LLM's context is {positions}")


def test_code_that_comes_with_a_model_is_not_run(finetune, llm, tmp_path, monkeypatch):
    """Nor asked about: transformers would wait for an answer at the keyboard."""
    folder = llm()
    (folder / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    tree = json.loads((folder / "config.json").read_text())
    tree |= {"model_type": "theirs", "auto_map": {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"}}
    (folder / "config.json").write_text(json.dumps(tree))
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked"))
    refused(finetune, tmp_path, "cannot be loaded as a causal LM")
    assert not Path(tmp_path, "ran").exists()
