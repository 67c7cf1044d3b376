"""The frozen embedding table of a causal LM, read from its safetensors without building the model."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from v2flow_cli.errors import ModelError, foreign_errors
from v2flow_cli.runtime.hub import model_folder

# Llama, Qwen, Phi-3, Mixtral and nearly all causal LMs; then GPT-2, GPT-NeoX, Falcon and OPT.
TABLE_NAMES = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


def load_vocab_embeddings(path_or_id: str) -> Tensor:
    """The input embeddings (V, D) in float32 of the causal LM in a folder or on the hub, without rows beyond its words.

    From the hub only the file with the table is downloaded.

    Raises:  ModelError if there is no such model, or it has no embedding table.
    """
    file, name, words = _find_table(path_or_id)
    with safe_open(file, framework="pt") as weights:
        return weights.get_slice(name)[:words].float()


def vocab_shape(path_or_id: str) -> tuple[int, int]:
    """(V, D) of ``load_vocab_embeddings``, without reading the table.  Raises: as it."""
    file, name, words = _find_table(path_or_id)
    with safe_open(file, framework="pt") as weights:
        rows, width = weights.get_slice(name).get_shape()
    return min(rows, words), width


def _find_table(path_or_id: str) -> tuple[Path, str, int]:
    """(file, name, words) of the input table."""
    config = model_folder(path_or_id, ("*.json",))
    index = config / "model.safetensors.index.json"
    with foreign_errors(f"{path_or_id}: the embedding table cannot be read"):
        if index.is_file():
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        else:
            single = model_folder(path_or_id, ("model.safetensors",)) / "model.safetensors"
            with safe_open(single, framework="pt") as weights:
                files = dict.fromkeys(weights.keys(), "model.safetensors")
        name = next((key for key in files if key.endswith(TABLE_NAMES)), None)
        if name is None:
            raise ModelError(f"{path_or_id}: no embedding table found (looked for {', '.join(TABLE_NAMES)}).")
        file = model_folder(path_or_id, (files[name],)) / files[name]
        with safe_open(file, framework="pt") as weights:
            rows = weights.get_slice(name).get_shape()[0]
        words = min(rows, _words(config, rows))
    return file, name, words


def _words(folder: Path, rows: int) -> int:
    """Rows for words. Qwen and others pad the table, and an LLM that draws has visual tokens after them."""
    config = folder / "config.json"
    if config.is_file() and (drawing := json.loads(config.read_text(encoding="utf-8")).get("v2flow")):
        return int(drawing["visual_token_offset"])
    file = folder / "tokenizer.json"
    if not file.is_file():
        return rows
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(file)).get_vocab_size(with_added_tokens=True)
