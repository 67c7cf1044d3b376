"""The pages match the code: the recipe reference is current, links resolve, quoted commands exist."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import typer.main

from v2flow_cli.cli.app import app
from v2flow_cli.recipe.retired import RETIRED
from v2flow_cli.recipe.schema import KINDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
FENCE = re.compile(r"^```.*?^```", re.M | re.S)


@pytest.fixture
def script(monkeypatch):
    """Loads one of the scripts in docs/ as a module."""

    def load(name: str):
        spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # dataclasses look themselves up there
        spec.loader.exec_module(module)
        return module

    return load


def test_the_pages_show_the_help_of_their_commands(script):
    held = re.search(r"^typer==([\d.]+)", (ROOT / "constraints.txt").read_text("utf-8"), re.M)
    if held is None or typer.__version__ != held[1]:
        pytest.skip("another version of typer lays help out in another way")
    maker = script("make_command_reference")
    for name in COMMANDS:
        text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        hint = f"docs/{name}.md is out of date: run `python docs/make_command_reference.py`"
        assert "--help" in text and text == maker.page_with_block(text, name), hint


def test_the_recipe_reference_is_that_of_the_schema(script):
    maker = script("make_recipe_reference")
    expected = maker.reference(maker.SCHEMA.read_text(encoding="utf-8"))
    written = maker.REFERENCE.read_text(encoding="utf-8")
    assert written == expected, "docs/recipes.md is out of date: run `python docs/make_recipe_reference.py`"


def test_every_key_of_the_recipes_has_a_meaning(script):
    maker = script("make_recipe_reference")
    sections = maker.read_sections(maker.SCHEMA.read_text(encoding="utf-8"))
    without = [
        f"{section.name}.{field.name}"
        for section in sections.values()
        for field in section.fields
        if not field.meaning and field.name != "kind" and not set(field.annotation.split(" | ")) & set(sections)
    ]
    assert without == []


def test_every_page_is_in_the_sites_navigation_and_on_the_start_page():
    docs = ROOT / "docs"
    pages = {str(page.relative_to(docs)) for page in docs.rglob("*.md")}
    named = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M)
    assert sorted(named) == sorted(pages)
    linked = set(re.findall(r"\]\(([\w/-]+\.md)\)", (docs / "index.md").read_text("utf-8")))
    assert linked == pages - {"index.md"}


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_resolve(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        off_the_site = page.parent != ROOT and not found.is_relative_to(ROOT / "docs")
        if off_the_site or not found.exists() or (anchor and anchor not in anchors(found)):
            broken.append(target)
    assert broken == []


def quoted_commands() -> list[tuple[str, str]]:
    """(where, command line) of every ``v2flow`` line in the pages, the commands' help and the recipes' headers."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        lines = re.findall(r"^ {4,}(v2flow .+)$", text, re.M)
        lines += re.findall(r"^(v2flow .+)$", "\n".join(FENCE.findall(text)), re.M)
        lines += re.findall(r"`(v2flow [^`]+)`", text)
        lines += [f"v2flow {rest}" for rest in re.findall(r"-m v2flow_cli\.cli\.app (.+)$", text, re.M)]
        found += [(page.name, line) for line in lines]
    for name, command in COMMANDS.items():
        helps = [command.help, *(mode.help for mode in getattr(command, "commands", {}).values())]
        found += [(f"{name} --help", line) for text in helps for line in re.findall(r"^\s*(v2flow .+)$", text, re.M)]
    for recipe in sorted((ROOT / "recipes").rglob("*.yaml")):
        lines = re.findall(r"^#\s+(v2flow .+)$", recipe.read_text(encoding="utf-8"), re.M)
        found += [(str(recipe.relative_to(ROOT)), line) for line in lines]
    return found


@pytest.mark.parametrize(("where", "line"), quoted_commands())
def test_quoted_commands_parse(where, line):
    line = re.sub(r"\[(-[^\[\]]*)\](\.\.\.)?", r"\1", line)  # optional parts of a synopsis
    _, name, *arguments = shlex.split(line, comments=True)
    if name.startswith("--") or name == "COMMAND":
        return
    assert name in COMMANDS, f"{where}: {line}: no such command"
    if not arguments or "--help" in arguments:  # the command named, not run
        return
    parse(name, arguments)


def parse(name: str, arguments: list[str]) -> None:
    """Parses all options and values as a run would, and stops there; a wrong one raises a usage error."""
    command = COMMANDS[name]
    context = command.make_context(name, arguments)
    if hasattr(command, "commands"):  # a group: what is left is the mode and its arguments
        mode, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        found.make_context(mode, rest, parent=context)


def test_wrong_commands_are_detected():
    for arguments in (["imgs/", "-o", "x", "--resolution", "4"], ["imgs/"], ["imgs/", "-o", "x", "--res", "big"]):
        with pytest.raises(Exception) as error:
            parse("encode", arguments)
        assert error.value.exit_code == 2  # a usage error


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_named_in_the_pages_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:recipes|tests|docs|v2flow_cli)/[\w./-]+\.(?:py|yaml|md|html))(?:::(\w+))?`", text)
    missing = [path for path, _ in named if not (ROOT / path).is_file()]
    assert missing == []
    names = [(path, name) for path, name in named if name]
    lost = [f"{p}::{n}" for p, n in names if not re.search(rf"\b(def|class) {n}\b", (ROOT / p).read_text("utf-8"))]
    assert lost == []


# Of the project's own folders: a .venv in the checkout would have every name there is.
OWN = (path for folder in ("docs", "recipes", "tests", "v2flow_cli") for path in (ROOT / folder).rglob("*"))
CODE = "\n".join(
    path.read_text(encoding="utf-8")
    for path in [ROOT / "pyproject.toml", ROOT / "Makefile", *OWN]
    if path.suffix in (".py", ".yaml", ".html", ".toml") or path.name == "Makefile"
)
NAMES = set(re.findall(r"\w+", CODE))
OF_OTHERS = {"allowed_token_ids", "ignore_eos", "min_tokens", "SamplingParams"}  # names of vLLM


def recipe_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a recipe."""
    for name, hint in typing.get_type_hints(schema).items():
        yield prefix + name
        for section in filter(dataclasses.is_dataclass, (hint, *typing.get_args(hint))):
            yield from recipe_keys(section, f"{prefix}{name}.")


def options_of(command: typing.Any) -> Iterator[str]:
    """Long options of a command and of its modes."""
    for parameter in command.params:
        yield from (*parameter.opts, *parameter.secondary_opts)
    for mode in getattr(command, "commands", {}).values():
        yield from options_of(mode)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_keys_options_and_symbols_of_the_pages_exist(page):
    """A key in backticks is one of the schema (or retired), an option one of a command, a name one of the code."""
    keys = {key for schema in KINDS.values() for key in recipe_keys(schema)} | set(RETIRED)
    sections = {key.split(".")[0] for key in keys if "." in key}
    names = NAMES | OF_OTHERS
    options = set(options_of(typer.main.get_command(app))) | {"--help"}
    options |= {f"--{name.replace('_', '-')}" for name in names}  # of modules that are run by `python -m`
    lost = []
    for span in re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text(encoding="utf-8"))):
        key = re.match(r"([a-z]+\.\w+)(?:[:=].*)?$", span)
        if key and key[1].split(".")[0] in sections and not key[1].endswith(".safetensors"):
            lost += [span] if key[1] not in keys else []
        elif span.startswith(("--", "v2flow ")):
            lost += [option for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span) if option not in options]
        elif re.fullmatch(r"[A-Za-z_]\w+(\(\))?", span) and re.search("_|[a-z][A-Z]", span):
            lost += [span] if span.removesuffix("()") not in names else []
    assert lost == []


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, tiny_tokenizer_folder, sample_images):
    monkeypatch.setattr("v2flow_cli.tokenizer.embedded.EMBEDDED_MODEL", tiny_tokenizer_folder)
    monkeypatch.chdir(tmp_path)
    sample_images[0].save("photo.jpg")
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "decoded.png").is_file()


@pytest.mark.slow
def test_the_python_page_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys, sample_images):
    monkeypatch.chdir(tmp_path)
    sample_images[1].save("photo.jpg")
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/python.md").read_text("utf-8"), re.M | re.S)
    exec(compile(code, "python.md", "exec"), {})
    printed = re.findall(r"print\(.*  # (torch\.Size\(\[[\d, ]+\]\))", code)
    assert capsys.readouterr().out.split("\n")[:-1] == printed and len(printed) == 4
    assert {path.name for path in tmp_path.glob("*.png")} == {"decoded.png", "drawn-0.png", "drawn-1.png"}


def test_the_serving_page_draws_with_plain_transformers(tmp_path, monkeypatch):
    """The page's code runs unchanged on an LLM as finetune-llm saves it, without importing v2flow."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from v2flow_cli.llm.sequences import prompt_frame
    from v2flow_cli.llm.vocabulary import VisualVocabulary, add_visual_tokens, extend_tables
    from v2flow_cli.training.objectives.language_model import train_tokenizer

    tokenizer = train_tokenizer(["a red fox"], 300)
    words = len(tokenizer)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=words, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    extend_tables(model, words, 64, None, seed=0)
    vocabulary = VisualVocabulary(words, 64, words + 64, words + 65, 9, "0" * 16, *prompt_frame(tokenizer), 1)
    model.config.v2flow = vocabulary.record()
    model.save_pretrained(tmp_path / "my-llm")
    add_visual_tokens(tokenizer, words, 64).save_pretrained(tmp_path / "my-llm")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    [plain] = [block for block in blocks if "AutoModelForCausalLM" in block]
    assert "v2flow_cli" not in plain
    exec(compile(plain, "serving.md", "exec"), {})
    ids = np.load(tmp_path / "foxes.npy")
    assert ids.shape == (4, 9) and ids.dtype == np.uint16 and ids.max() < 64
    assert len({tuple(row) for row in ids}) > 1
