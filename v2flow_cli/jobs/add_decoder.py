"""Adds a second decoder to a tokenizer folder, from another trained folder with the same ids."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save

from v2flow_cli.errors import ModelError, foreign_errors
from v2flow_cli.store.files import write_bytes
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.other_decoders import (
    DECODER,
    DECODER_SECTIONS,
    FAITHFUL,
    PIXEL_DECODER,
    SHA256,
    decoder_file,
)

NAME = re.compile(r"[a-z][a-z0-9-]*")


def add_decoder(folder: str | Path, trained: str | Path, name: str = "sharp", *, default: bool = False) -> None:
    """Copy the decoder of the tokenizer folder ``trained`` to ``folder`` as ``name``, replacing one of that name.

    Its weights keep their number format, and its sampling settings are copied too. With ``default`` it becomes the
    default decoder of ``folder``. Nothing else in ``folder`` changes; the token digest stays the same.

    Raises:  ModelError for folders whose token digests differ or that cannot be read, and for a bad name.
    """
    folder, trained = Path(folder), Path(trained)
    if not NAME.fullmatch(name) or name == FAITHFUL:
        raise ModelError(
            f"A decoder cannot be named {name!r}: expected lower-case letters, digits and hyphens. {FAITHFUL} is the "
            "decoder in model.safetensors."
        )
    target, other = (V2FlowTokenizer.from_pretrained(path, decoder=FAITHFUL) for path in (folder, trained))
    if target.token_digest != other.token_digest:
        raise ModelError(
            f"{trained}: its token digest is {other.token_digest}, that of {folder} is {target.token_digest}; a "
            "decoder reads the ids of one tokenizer. Train it with init_from and freeze_tokens: true."
        )
    weights = trained / "model.safetensors"
    with foreign_errors(f"{weights}: the decoder cannot be read"), safe_open(weights, framework="pt") as file:
        names = [key for key in file.keys() if key.split(".")[0] in DECODER]
        content = save({key: file.get_tensor(key) for key in names})
    settings = {key: getattr(other.config, key) for key in (*DECODER_SECTIONS, PIXEL_DECODER)}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["decoders"] = {
        **(config.get("decoders") or {}),
        name: {**settings, SHA256: hashlib.sha256(content).hexdigest()},
    }
    if default:
        config["default_decoder"] = name
    write_bytes(folder / decoder_file(name), content)
    write_bytes(folder / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
