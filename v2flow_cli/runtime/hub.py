"""A model's folder, or its id on the Hugging Face hub, to a folder on this disk; uploads to the hub."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from v2flow_cli.errors import ModelError, foreign_errors, reason_of
from v2flow_cli.runtime.publishing import check_published

REPO_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")  # NAME or OWNER/NAME
ANSWER_SECONDS = 5.0  # that the hub has to answer whether a repository exists
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
    """The folder ``name``, or the hub's repository of that id, from the hub's cache or downloaded into it.

    A path that does not exist is an error at once: OWNER/NAME is a path if the current folder has a folder OWNER.
    Without a network, if the hub does not answer, and with ``HF_HUB_OFFLINE=1``, the repository's files in the cache
    are used.

    Args:    patterns, of the files (those in subfolders are left out); revision, a branch, tag or commit;
             token, for a private repository (default: that of ``hf auth login`` or HF_TOKEN); cache_dir, instead of
             the hub client's own; local_files_only, do not contact the hub.
    Raises:  ModelError for a folder or repository that does not exist or may not be read, and for a folder whose files
             are being replaced.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        check_published(path)
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
            # First, because snapshot_download would wait for ever for a hub that does not answer.
            HfApi(token=token).repo_info(text, revision=revision, timeout=ANSWER_SECONDS)
            return Path(snapshot_download(text, revision=revision, **files))
        reason: Exception = errors.OfflineModeIsEnabled()
    except Exception as error:  # the hub client, its HTTP library and the disk raise a dozen kinds
        reason = error
    try:
        if isinstance(reason, errors.RevisionNotFoundError):
            raise reason
        return Path(snapshot_download(text, revision=revision, local_files_only=True, **files))
    except Exception:
        where = f"{text} (revision {revision})" if revision else text
        raise ModelError(f"{where}: {_reason(reason)}.{_similar(path)}") from reason


def may_be_hub_id(name: str) -> bool:
    """True for NAME, and for OWNER/NAME if the current folder has no folder OWNER."""
    return bool(REPO_ID.fullmatch(name)) and ("/" not in name or not Path(name).parent.is_dir())


def create_repository(repo_id: str, *, public: bool = False) -> None:
    """Create a model repository on the hub, private unless ``public``; an existing one keeps its visibility.

    Raises:  ModelError if the id is invalid, or the user may not write there.
    """
    if not REPO_ID.fullmatch(repo_id):
        raise ModelError(f"--push {repo_id}: not a repository id; expected OWNER/NAME.")
    from huggingface_hub import HfApi

    with foreign_errors(
        f"--push {repo_id}: the hub does not allow writing",
        "Log in with a write token (`hf auth login`, or HF_TOKEN), or leave out --push.",
    ):
        HfApi().create_repo(repo_id, private=not public, exist_ok=True)


def push_model(folder: Path, repo_id: str) -> str:
    """Upload the model in ``folder``, without checkpoints and logs, as one commit; returns the page's address.

    Raises:  ModelError if the hub refuses it.
    """
    from huggingface_hub import HfApi

    with foreign_errors(
        f"--push {repo_id}: the model is complete in {folder}, but could not be uploaded",
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
    """The folder that ``path`` may misspell, as a question; empty if there is none."""
    folder = Path(path.anchor)
    for part in path.parts[1:] if path.anchor else path.parts:
        if part != ".." and not (folder / part).is_dir():
            try:
                names = [child.name for child in folder.iterdir() if child.is_dir()]
            except OSError:
                return ""
            close = difflib.get_close_matches(part, names, n=1, cutoff=0.7)
            if not close:
                return ""
            part = close[0]
        folder /= part
    return f" Did you mean {folder}?"


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "a gated repository; request access on its page, and log in (`hf auth login`)"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub has this repository, but no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such folder, and no such repository on the hub; a private one needs a token (`hf auth login`)"
    missing = "no such folder, not complete in the hub's cache, and the hub"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{missing} is not contacted in offline mode"
    if isinstance(error, errors.HfHubHTTPError):
        return f"{missing} refuses ({reason_of(error)})"
    return f"{missing} cannot be reached ({reason_of(error)})"
