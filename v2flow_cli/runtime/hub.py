"""What a user calls a model, a folder or an id on the Hugging Face hub, to a folder on this disk."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from v2flow_cli.errors import ModelError, foreign_errors, reason_of

REPO_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")  # NAME or OWNER/NAME
ANSWER_SECONDS = 5.0  # in which the hub has to say whether it knows a repository
WEIGHTS = ("*.safetensors",)
PAGES = ("README.md", "recipe.yaml")
SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model", "*.npy")  # configs, and what text tokenizers need


def model_folder(
    name: str | Path,
    patterns: Sequence[str] = (*SETTINGS, *WEIGHTS),
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder ``name``; or the hub's repository of that id, from its cache or fetched into it.

    A path that does not exist is told at once: OWNER/NAME is such a path where a folder OWNER lies here. Without a
    network, with a hub that is silent, or with ``HF_HUB_OFFLINE=1``, what the cache holds of the repository is taken.

    Args:    patterns, of the files wanted (those in subfolders are left out); revision, a branch, tag or commit;
             token, for a private repository (default: that of ``hf auth login`` or HF_TOKEN); cache_dir, instead of
             the hub client's own; local_files_only, do not ask the hub.
    Raises:  ModelError for a folder or repository that is not there or may not be read.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{name}: a file; expected the folder of a model, or a hub id.")
    text = str(name)
    if not may_be_hub_id(text):
        raise ModelError(f"{text}: no such folder.{_similar(path)}")
    from huggingface_hub import HfApi, errors, snapshot_download

    files: dict[str, Any] = dict(cache_dir=cache_dir, token=token, allow_patterns=list(patterns))
    files["ignore_patterns"] = ["*/*", "*.fp16.*"]
    try:
        if not local_files_only:
            # Asked first: for a hub that is silent, snapshot_download would wait for ever.
            HfApi(token=token).repo_info(text, revision=revision, timeout=ANSWER_SECONDS)
            return Path(snapshot_download(text, revision=revision, **files))
        reason: Exception = errors.OfflineModeIsEnabled()
    except Exception as error:  # the hub client, its HTTP library and the disk have a dozen kinds
        reason = error
    try:
        if isinstance(reason, errors.RevisionNotFoundError):
            raise reason
        return Path(snapshot_download(text, revision=revision, local_files_only=True, **files))
    except Exception:
        where = f"{text} (revision {revision})" if revision else text
        raise ModelError(f"{where}: {_reason(reason)}.{_similar(path)}") from reason


def may_be_hub_id(name: str) -> bool:
    """True for NAME, and for OWNER/NAME where no folder OWNER lies here."""
    return bool(REPO_ID.fullmatch(name)) and ("/" not in name or not Path(name).parent.is_dir())


def create_repository(repo_id: str, *, public: bool = False) -> None:
    """A repository for a model on the hub, private unless ``public``; one that exists stays as visible as it is.

    Raises:  ModelError where the id is none, or the user may not write there.
    """
    if not REPO_ID.fullmatch(repo_id):
        raise ModelError(f"--push {repo_id}: not a repository id; expected OWNER/NAME.")
    from huggingface_hub import HfApi

    with foreign_errors(
        f"--push {repo_id}: the hub gives no place to write",
        "Log in with a token that may write (`hf auth login`, or HF_TOKEN), or leave --push out.",
    ):
        HfApi().create_repo(repo_id, private=not public, exist_ok=True)


def push_model(folder: Path, repo_id: str) -> str:
    """Upload the model in ``folder``, without checkpoints and logs, as one commit; returns the page's address.

    Raises:  ModelError where the hub does not take it.
    """
    from huggingface_hub import HfApi

    with foreign_errors(
        f"--push {repo_id}: the model is whole in {folder}, but could not be uploaded",
        "Run the same command with --resume to push it again.",
    ):
        api = HfApi()
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[*SETTINGS, *WEIGHTS, *PAGES],
            ignore_patterns=["*/*"],
            commit_message="Model trained by v2flow",
        )
        return f"{api.endpoint}/{repo_id}"


def _similar(path: Path) -> str:
    """The folder that ``path`` may be a misspelling of, as a question; empty where there is none."""
    found = Path(path.anchor)
    for part in path.parts[1:] if path.anchor else path.parts:
        if part != ".." and not (found / part).is_dir():
            try:
                names = [folder.name for folder in found.iterdir() if folder.is_dir()]
            except OSError:
                return ""
            close = difflib.get_close_matches(part, names, n=1, cutoff=0.7)
            if not close:
                return ""
            part = close[0]
        found /= part
    return f" Did you mean {found}?"


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "a gated repository; ask for access on its page, and give a token (`hf auth login`)"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub has this repository, but no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such folder, and no such repository on the hub; a private one needs a token (`hf auth login`)"
    missing = "no such folder, not complete in the hub's cache, and the hub"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{missing} is not asked, being offline"
    if isinstance(error, errors.HfHubHTTPError):
        return f"{missing} refuses ({reason_of(error)})"
    return f"{missing} cannot be reached ({reason_of(error)})"
