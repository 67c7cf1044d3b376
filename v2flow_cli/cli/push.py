"""``--push REPO`` of ``train`` and ``finetune-llm``: the first process alone asks the hub."""

from __future__ import annotations

from pathlib import Path

import typer

from v2flow_cli.cli.console import is_main_process, log


def prepare_push(repo_id: str | None, public: bool, licence: str) -> None:
    """Before the training: a place on the hub, so that a missing token is told now and not after days.

    Raises:  ModelError where there is none.
    """
    if public and not repo_id:
        raise typer.BadParameter("--public says who may see what --push uploads; give --push REPO too.")
    if not repo_id or not is_main_process():
        return
    from v2flow_cli.runtime.hub import create_repository

    create_repository(repo_id, public=public)
    if licence == "unknown":
        log("the model card will name no licence; --set card.license=apache-2.0, or another, names one")


def push_result(repo_id: str | None, folder: str | Path) -> str | None:
    """After it: upload, and the page's address; None where nothing is pushed.  Raises: ModelError."""
    if not repo_id or not is_main_process():
        return None
    from v2flow_cli.runtime.hub import push_model

    log(f"{folder}: uploading to {repo_id}")
    return push_model(Path(folder), repo_id)
