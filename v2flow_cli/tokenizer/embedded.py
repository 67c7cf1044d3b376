"""The tokenizers inside the package, by name: ``default`` (a grid, with an LLM) and ``flexible`` (FlexTok's parts).

The file of ``flexible`` does not repeat the autoencoder, which is that of ``default``: its config has the digest of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from v2flow_cli.errors import ModelError, foreign_errors
from v2flow_cli.runtime.digest import weights_digest
from v2flow_cli.runtime.hub import model_folder
from v2flow_cli.runtime.publishing import publishing
from v2flow_cli.tokenizer.pretrained import WEIGHTS

ASSETS = Path(__file__).resolve().parents[1] / "assets"
EMBEDDED_MODEL = ASSETS / "default" / "tokenizer"
FLEXIBLE_MODEL = ASSETS / "flexible"
NAMES = {"default": EMBEDDED_MODEL, "flexible": FLEXIBLE_MODEL}
AUTOENCODER = "latents.autoencoder."  # prefix of its weights in a tokenizer's file
SHARED = "shared_autoencoder"  # key of such a config


def tokenizer_folder(name: str | Path | None, **hub: Any) -> Path:
    """The folder of a tokenizer: an embedded one's (None: ``default``), else as ``runtime.hub.model_folder``.

    A folder of that name in the current folder goes before an embedded one.
    Raises:  as ``model_folder``, whose options ``hub`` are.
    """
    if name is None:
        return EMBEDDED_MODEL
    if str(name) in NAMES and not Path(name).exists():
        return NAMES[str(name)]
    return model_folder(name, **hub)


def autoencoder_weights(folder: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The autoencoder in the folder of a tokenizer with this ``config``, its names without prefix, as stored.

    Raises:  ModelError for a file that cannot be read, and if a shared autoencoder is not that of the config.
    """
    shared = config.get(SHARED, "")
    path = (EMBEDDED_MODEL if shared else folder) / WEIGHTS
    with foreign_errors(f"{folder}: the tokenizer's autoencoder cannot be read"), safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith(AUTOENCODER)]
        weights = {name.removeprefix(AUTOENCODER): file.get_tensor(name) for name in names}
    if shared and shared != (digest := weights_digest(weights)):
        raise ModelError(
            f"{folder}: trained on the autoencoder {shared}, but that of the embedded model is {digest}. "
            "Use the version of v2flow that it belongs to."
        )
    return weights


def share_autoencoder(folder: Path, out: Path, **sampling: float) -> None:
    """Write the tokenizer in ``folder`` to ``out`` in bfloat16 and without its autoencoder, to be embedded.

    ``sampling`` replaces its own settings of that section. Trainings store the encoder in float32. Its rounded weights
    give other ids here and there, so ``out`` has a token digest of its own.
    Raises:  ModelError if its autoencoder is not that of the embedded model.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config[SHARED] = weights_digest(autoencoder_weights(folder, config))
    autoencoder_weights(folder, config)  # the check
    config["sampling"] = config["sampling"] | sampling
    weights = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in load_file(folder / WEIGHTS).items()
        if not name.startswith(AUTOENCODER)
    }
    with publishing(out) as target:
        for file in (folder / name for name in ("README.md", "recipe.yaml", "preprocessor_config.json")):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
        (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(weights, target / WEIGHTS, metadata={"format": "pt"})
