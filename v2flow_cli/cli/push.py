"""``--push REPO`` of ``train`` and ``finetune-llm``: only the first process contacts the hub."""

from __future__ import annotations

from pathlib import Path

import typer

from v2flow_cli.cli.console import is_main_process, log


def prepare_push(repo_id: str | None, public: bool, licence: str) -> None:
    """Before the training, create the repository, so that a missing token is an error now and not days later.

    Raises:  ModelError if that fails.
    """
    if public and not repo_id:
        raise typer.BadParameter("--public applies to the repository of --push; add --push REPO.")
    if not repo_id or not is_main_process():
        return
    from v2flow_cli.runtime.hub import create_repository

    create_repository(repo_id, public=public)
    if licence == "unknown":
        log("the model card names no licence; set one with --set card.license=apache-2.0, or another")


def push_result(repo_id: str | None, folder: str | Path) -> str | None:
    """After the training, upload; the page's address, or None without ``--push``.  Raises: ModelError."""
    if not repo_id or not is_main_process():
        return None
    from v2flow_cli.runtime.hub import push_model

    log(f"{folder}: uploading to {repo_id}")
    return push_model(Path(folder), repo_id)
