"""10. Nothing in the package runs what a file says: no pickle, no remote code, no shell, no eval."""

import re
from pathlib import Path

import pytest

from v2flow_cli.errors import V2FlowError
from v2flow_cli.store.find import find_tars

PACKAGE = Path(__file__).resolve().parents[2] / "v2flow_cli"
UNSAFE = {
    "pickle": r"\bimport pickle|\bpickle\.|\bimport (dill|cloudpickle|joblib|shelve|marshal)\b",
    "torch.load": r"\btorch\.load\(",
    "numpy pickles": r"allow_pickle\s*=\s*True",
    "remote code": r"trust_remote_code\s*=\s*True",
    "eval": r"(?<![\w.])(eval|exec)\(|(?<![\w.])compile\(\s*['\"]",
    "shell": r"shell\s*=\s*True|os\.system|os\.popen",
    "yaml objects": r"yaml\.(load|unsafe_load|full_load)\(",
    "classes by name": r"importlib\.import_module\((?!['\"])|__import__\(",
    "webdataset readers": r"WebDataset\(|WebLoader\(|gopen",  # pipe: URLs and .pyd members are theirs
    "extracting": r"\.extractall\(|\.extract\(",
    "swallowed": r"except:\s*$",
}


# `bench --external` imports the module that the user names on the command line; no file can name one.
EXEMPT = {"classes by name": {PACKAGE / "bench" / "coder.py"}}


@pytest.mark.parametrize("name", UNSAFE)
def test_no_unsafe_call(name):
    pattern = re.compile(UNSAFE[name], re.M)
    files = set(PACKAGE.rglob("*.py")) - EXEMPT.get(name, set())
    assert not [str(p) for p in files if pattern.search(p.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("name", UNSAFE)
def test_the_patterns_do_match(name):
    examples = (
        "import pickle\ntorch.load(f)\nallow_pickle=True\ntrust_remote_code = True\n eval(x)\nshell=True\n"
        "yaml.load(f)\n"
        "importlib.import_module(name)\nWebDataset(url)\ntar.extractall()\nexcept:\n"
    )
    assert re.search(UNSAFE[name], examples, re.M)


def test_urls_that_name_a_program_are_names_of_files_that_do_not_exist(tmp_path):
    with pytest.raises(V2FlowError, match="no such file or folder"):
        find_tars([f"pipe:touch {tmp_path}/ran"])
    assert not (tmp_path / "ran").exists()
