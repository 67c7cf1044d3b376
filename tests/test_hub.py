"""Models to the hub and back, against a stand-in on loopback: push, revision, token, cache, errors."""

from __future__ import annotations

import json
import socket

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants
from PIL import Image
from typer.testing import CliRunner

from tests.hub_stand_in import TOKEN, Hub
from tests.llm.conftest import write_token_set
from v2flow_cli import DrawingLM, V2FlowTokenizer
from v2flow_cli.cli.app import app
from v2flow_cli.errors import ModelError
from v2flow_cli.recipe.schema import Card
from v2flow_cli.runtime.hub import create_repository, push_model
from v2flow_cli.training.card import front_matter


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with Hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants._HF_DEFAULT_ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def pushed(hub, tiny_tokenizer_folder):
    create_repository("me/tokenizer")
    push_model(tiny_tokenizer_folder, "me/tokenizer")
    return hub


def loads_as(folder, **options) -> bool:
    """Whether me/tokenizer decodes as the model in ``folder``."""
    ids = torch.tensor([[1, 2, 3, 4]])
    return torch.equal(
        V2FlowTokenizer.from_pretrained("me/tokenizer", **options).decode(ids, seeds=[0]),
        V2FlowTokenizer.from_pretrained(folder).decode(ids, seeds=[0]),
    )


def test_what_is_pushed_loads_again_private_by_default(pushed, tiny_tokenizer_folder):
    repository = pushed.repositories["me/tokenizer"]
    assert repository.private and len(repository.commits) == 1
    assert loads_as(tiny_tokenizer_folder)


def test_a_private_repository_needs_the_token(pushed, tiny_tokenizer_folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    message = r"^me/tokenizer: no such folder, and no such repository on the hub; a private one needs a token"
    with pytest.raises(ModelError, match=message):
        V2FlowTokenizer.from_pretrained("me/tokenizer")
    assert loads_as(tiny_tokenizer_folder, token=TOKEN)


def test_a_revision_is_kept_apart(pushed, tiny_tokenizer_folder, tmp_path):
    repository = pushed.repositories["me/tokenizer"]
    repository.revisions["v1"] = repository.revisions["main"]
    config = json.loads((tiny_tokenizer_folder / "config.json").read_text()) | {"image_size": 64}
    repository.commit({"config.json": json.dumps(config).encode()})
    assert V2FlowTokenizer.from_pretrained("me/tokenizer").config.image_size == 64
    assert V2FlowTokenizer.from_pretrained("me/tokenizer", revision="v1").config.image_size == 32
    with pytest.raises(ModelError, match=r"\(revision v9\): the hub has this repository, but no such revision"):
        V2FlowTokenizer.from_pretrained("me/tokenizer", revision="v9")


def test_the_cache_is_used_without_a_network(pushed, tiny_tokenizer_folder, tmp_path):
    assert loads_as(tiny_tokenizer_folder)
    requests_before = len(pushed.requests)
    assert loads_as(tiny_tokenizer_folder, local_files_only=True) and len(pushed.requests) == requests_before
    pushed.stop()
    assert loads_as(tiny_tokenizer_folder)
    with pytest.raises(ModelError, match="me/other: no such folder, not complete in the hub's cache, and the hub cann"):
        V2FlowTokenizer.from_pretrained("me/other")
    with pytest.raises(ModelError, match="and the hub is not contacted in offline mode"):
        V2FlowTokenizer.from_pretrained("me/tokenizer", local_files_only=True, cache_dir=tmp_path / "empty")


@pytest.fixture
def silent_hub(monkeypatch, tmp_path):
    """Accepts connections and sends nothing, as some firewalls do; the client would wait for ever."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("v2flow_cli.runtime.hub.ANSWER_SECONDS", 0.2)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        yield


def test_a_hub_that_does_not_answer_times_out(silent_hub):
    with pytest.raises(ModelError, match=r"^me/other: no such folder, .* cannot be reached \(.*timed out"):
        V2FlowTokenizer.from_pretrained("me/other")


def test_case_21_a_typo_in_the_first_folder_is_suggested_too(silent_hub, tmp_path, monkeypatch):
    """OWNER/NAME with no folder OWNER may be a hub id, so the hub is contacted; the error names the likely folder."""
    (tmp_path / "runs" / "my-tokenizer").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"^rnus/my-tokeniser: no such folder.* Did you mean runs/my-tokenizer\?$"):
        V2FlowTokenizer.from_pretrained("rnus/my-tokeniser")
    with pytest.raises(ModelError, match=r"^rnus/deep/my-tok: no such folder\.$"):
        V2FlowTokenizer.from_pretrained("rnus/deep/my-tok")


MISTYPED = [
    ("encode photos -o t --model runs/typo", "runs/typo"),
    ("decode tokens --model runs/typo", "runs/typo"),
    ("generate fox --model runs/typo", "runs/typo"),
    ("generate fox --tokenizer runs/typo", "runs/typo"),
    ("generate --from-image photos/a.png --model runs/typo", "runs/typo"),
    ("bench photos --model runs/typo", "runs/typo"),
    ("bench photos --llm --llm-model runs/typo", "runs/typo"),
    ("bench photos --alignment --model runs/typo", "runs/typo"),
    ("train tokenizer.yaml --set latents.autoencoder=runs/typo", "runs/typo"),
    ("train tokenizer.yaml --set vocabulary.llm=runs/typo --set latents.autoencoder=pixels", "runs/typo"),
    ("train tokenizer.yaml --set init_from=runs/typo", "runs/typo"),
    ("finetune-llm llm.yaml --set tokenizer=runs/typo", "runs/typo"),
    ("finetune-llm llm.yaml --set llm=runs/typo --set tokenizer={tiny}", "runs/typo"),
    ("encode photos -o t --model ~/typo", "~/typo"),
    ("encode photos -o t --model file", "file: a file"),
]


@pytest.mark.parametrize(("command", "where"), MISTYPED)
def test_case_21_a_mistyped_path_does_not_contact_the_hub(
    command, where, tmp_path, monkeypatch, tiny_tokenizer_folder, request
):
    for name in ("repo_info", "snapshot_download"):
        monkeypatch.setattr(f"huggingface_hub.HfApi.{name}", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "runs" / "typos").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "file").touch()
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "a.txt").write_text("a picture")
    recipes = request.config.rootpath / "recipes" / "tiny"
    words = [str(recipes / word) if word.endswith(".yaml") else word for word in command.split()]
    tokens = V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder).encode(torch.zeros(1, 3, 32, 32))[0].numpy()
    (tmp_path / "tokens").mkdir()
    np.save(tmp_path / "tokens" / "a.npy", tokens.astype(np.uint16))
    if command.startswith("finetune-llm"):
        write_token_set(tmp_path / "set", V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder).token_digest)
        words += ["--set", "data.token_sets=[set]"]
    if command.startswith("train"):
        words += ["--set", "data.sources=[photos]"]
    done = CliRunner().invoke(app, [word.format(tiny=tiny_tokenizer_folder) for word in words])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.exception
    (error_line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert where in error_line and ("no such folder" in error_line or "a file; expected" in error_line), error_line
    assert not where.startswith("runs") or "Did you mean runs/typos?" in error_line


def test_an_llm_loads_from_the_hub_too(hub, tmp_path):
    from v2flow_cli.llm.sampling import DEFAULT_LLM

    create_repository("me/llm", public=True)
    push_model(DEFAULT_LLM, "me/llm")
    assert not hub.repositories["me/llm"].private
    llm = DrawingLM.from_pretrained("me/llm")
    assert llm.vocabulary == DrawingLM.from_pretrained().vocabulary and llm.name == "me/llm"


@pytest.fixture
def train(tmp_path, sample_images, request):
    """Two steps of the tiny autoencoder through the command line."""
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(sample_images[:2]):
        image.resize((96, 96)).save(tmp_path / "photos" / f"{number}.png")
    settings = {
        "data.sources": f"[{tmp_path / 'photos'}]",
        "data.workers": 0,
        "train.steps": 2,
        "train.batch_size": 2,
        "output": tmp_path / "ae",
        "card.license": "cc-by-4.0",
        "card.datasets": "[me/photos]",
    }
    recipe = request.config.rootpath / "recipes/tiny/autoencoder.yaml"
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return lambda *more: CliRunner().invoke(app, ["train", str(recipe), *sets, *more])


def test_train_pushes_the_model_and_its_card_alone(hub, train, tmp_path):
    done = train("--push", "me/ae", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["pushed"] == f"{hub.url}/me/ae"
    repository = hub.repositories["me/ae"]
    (files,) = repository.commits.values()
    assert repository.private and set(files) == {"README.md", "config.json", "model.safetensors", "recipe.yaml"}
    _, top, text = files["README.md"].decode().split("---\n", 2)
    card = yaml.safe_load(top)
    assert (card["license"], card["library_name"], card["pipeline_tag"]) == ("cc-by-4.0", "v2flow", "image-to-image")
    assert card["datasets"] == ["me/photos"]
    ((entry,), (result, *_)) = card["model-index"], card["model-index"][0]["results"]
    assert entry["name"] == "ae" and result["dataset"] == {"name": "photos", "type": "me/photos", "split": "train"}
    assert {metric["type"] for metric in result["metrics"]} >= {"loss"}
    assert str(tmp_path) not in text
    assert files["model.safetensors"] == (tmp_path / "ae" / "model.safetensors").read_bytes()


def test_finetune_llm_pushes_its_folder(hub, tmp_path, request):
    (tmp_path / "text.txt").write_text("a red fox runs over the hill and far away\n" * 400)
    recipe = request.config.rootpath / "recipes/tiny/lm.yaml"
    sets = (f"text=[{tmp_path / 'text.txt'}]", "train.steps=2", f"output={tmp_path / 'lm'}")
    command = ["finetune-llm", str(recipe), *(part for value in sets for part in ("--set", value))]
    done = CliRunner().invoke(app, [*command, "--push", "me/lm", "--public", "--json"])
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["pushed"] == f"{hub.url}/me/lm" and "the model card names no licence" in done.stderr
    (files,) = hub.repositories["me/lm"].commits.values()
    assert {"model.safetensors", "tokenizer.json", "config.json", "README.md"} <= set(files)
    assert not hub.repositories["me/lm"].private
    card = yaml.safe_load(files["README.md"].decode().split("---\n", 2)[1])
    assert (card["license"], card["pipeline_tag"], card["library_name"]) == (
        "unknown",
        "text-generation",
        "transformers",
    )
    (result,) = card["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "loss", "value": round(report["eval_loss"], 4)}]


def test_base_models_are_the_hub_ids_among_what_a_model_is_made_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    names = ("Qwen/Qwen3-0.6B", "runs/tokenizer", "none", "", "/models/llama", "Qwen/Qwen3-0.6B")
    figures = {"loss": 1.23456, "psnr_db": float("inf"), "other": float("nan")}
    kind = dict(library="transformers", task="text-to-image", split="validation")
    text = front_matter(Card(), "runs/llm", base_models=names, data=("/home/me/tokens",), metrics=figures, **kind)
    card = yaml.safe_load(text.split("---\n")[1])
    assert card["base_model"] == ["Qwen/Qwen3-0.6B"]
    (entry,) = card["model-index"]
    assert entry["name"] == "llm" and entry["results"][0]["dataset"]["name"] == "tokens"
    assert entry["results"][0]["metrics"] == [{"type": "loss", "value": 1.2346}]


def test_a_read_only_token_is_an_error_before_the_training(hub, train, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    done = train("--push", "me/ae")
    assert done.exit_code == 1 and "--push me/ae: the hub does not allow writing (" in done.stderr
    assert "hf auth login" in done.stderr and not (tmp_path / "ae").exists()


def test_a_push_that_fails_keeps_the_model_and_resume_pushes_it(hub, train, tmp_path):
    hub.refuse_commits = True
    done = train("--push", "me/ae")
    assert done.exit_code == 1 and "the model is complete in" in done.stderr and "--resume" in done.stderr
    assert (tmp_path / "ae" / "model.safetensors").exists()
    hub.refuse_commits = False
    again = train("--push", "me/ae", "--resume")
    assert again.exit_code == 0, again.stderr
    assert "model.safetensors" in next(iter(hub.repositories["me/ae"].commits.values()))


def test_contradicting_push_options(train):
    done = train("--push", "not a repository")
    assert done.exit_code == 1 and "--push not a repository: not a repository id; expected OWNER/NAME" in done.stderr
    done = train("--public")
    assert done.exit_code == 2 and "add --push REPO" in done.stderr


def test_an_unreachable_hub_is_an_error(train, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        done = train("--push", "me/ae")
    assert done.exit_code == 1 and "the hub does not allow writing (" in done.stderr
