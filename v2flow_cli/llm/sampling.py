"""The default sampling of an LLM: in its folder's generation_config.json, under transformers' own names."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import v2flow_cli
from v2flow_cli.errors import foreign_errors
from v2flow_cli.recipe.schema import DrawSampling
from v2flow_cli.runtime.hub import model_folder

DEFAULT_LLM = Path(v2flow_cli.__file__).parent / "assets" / "default" / "llm"
FILE = "generation_config.json"


def store_sampling(model: Any, sampling: DrawSampling) -> None:
    """Add ``sampling`` to the model's generation config, which ``save_pretrained`` writes."""
    model.generation_config.update(do_sample=True, **asdict(sampling))


def stored_sampling(name: str | Path, **hub: Any) -> DrawSampling:
    """The sampling that the folder or hub id ``name`` stores; the defaults of ``DrawSampling`` if it stores none.

    Raises:  ModelError for a missing folder, or values that are no sampling settings.
    """
    path = model_folder(name, (FILE,), **hub) / FILE
    if not path.is_file():
        return DrawSampling()
    with foreign_errors(f"{path}: cannot be read", "Remove it to draw at temperature 1."):
        values = json.loads(path.read_text("utf-8"))
        if not values.get("do_sample"):  # the base LLM's own file, for text
            return DrawSampling()
        defaults = asdict(DrawSampling()).items()
        return DrawSampling(**{key: type(v)(values[key]) for key, v in defaults if values.get(key) is not None})
