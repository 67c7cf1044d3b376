"""A tokenizer at one setting for the bench: ours, or an external one that follows a small protocol.

The protocol of an external tokenizer (``--external module:factory``): an object with

    codebook_size                   int, ids lie in [0, codebook_size)
    encode(images) -> ids           (B, 3, S, S) float in [-1, 1] -> (B, L) integers
    decode(ids) -> images           (B, L) -> (B, 3, S, S) float in [-1, 1]

and optionally ``name`` (str) and ``weights_digest`` (str).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v2flow_cli.bench.sweep import Setting
from v2flow_cli.errors import ModelError
from v2flow_cli.runtime.device import inference
from v2flow_cli.tokenizer import V2FlowTokenizer


@dataclass(frozen=True)
class Coder:
    """encode: images (B, 3, H, W) to ids (B, L); decode: ids, one seed each, and (H, W), to images; both in [-1, 1].

    Coders of one ``source`` share their ids: a batch is encoded once for all of them.
    """

    name: str
    model: str
    kind: str  # "tokenizer" (ours) or "external"
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, Sequence[int], tuple[int, int]], Tensor]
    codebook_size: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokens: int | None = None  # decode only the first so many ids
    weights_digest: str | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    length: int | None = None  # the length of ``encode``, if there are several that are no prefixes of each other
    refine_steps: int = 0  # of ``encode``

    @property
    def source(self) -> str:
        """A name for the ids: the model, and what they depend on. Prefixes of the same ids have the same name."""
        length = "" if self.length is None else f" at {self.length} tokens"
        return f"{self.model}{length}" + (f", {self.refine_steps} steps" if self.refine_steps else "")


def v2flow_coder(model: str, tokenizer: V2FlowTokenizer, setting: Setting, dtype: torch.dtype = torch.float32) -> Coder:
    """A tokenizer of ours, with products in ``dtype``, as in the commands."""
    tokenizer = tokenizer.with_decoder(setting.decoder)
    steps = tokenizer.steps_to_refine(setting.tokens, setting.refine_steps)
    length = None if tokenizer.flexible and not steps else setting.tokens
    refined = {"refine_steps": steps} if steps else {}
    decoder = {"decoder": tokenizer.decoder_name} if len(tokenizer.decoder_names) > 1 else {}

    def encode(images: Tensor) -> Tensor:
        with inference(tokenizer.device, dtype):
            return tokenizer.encode(images, length, steps)

    def decode(ids: Tensor, seeds: Sequence[int], size: tuple[int, int]) -> Tensor:
        with inference(tokenizer.device, dtype):
            return tokenizer.decode(ids, height=size[0], width=size[1], seeds=seeds, **setting.values)

    name = setting.name(model)
    if steps and setting.refine_steps is None:  # the model's own
        name = f"{name}, refine {steps}"
    return Coder(
        name,
        model,
        "tokenizer",
        encode,
        decode,
        tokenizer.config.codebook_size,
        {**decoder, **(tokenizer.config.sampling or {}), **setting.values, **refined},
        setting.tokens,
        tokenizer.digest,
        tokenizer.device,
        length,
        steps,
    )


def load_external(name: str) -> Coder:
    """The tokenizer that ``name`` builds: ``package.module:factory`` or ``path/to/file.py:factory``.

    It imports and runs the user's own code; ``factory`` takes no arguments.
    Raises:  ModelError if it cannot be imported, or its result does not follow the protocol above.
    """
    source, _, factory = name.rpartition(":")
    if not source or not factory:
        raise ModelError(f"--external {name}: expected MODULE:FACTORY or FILE.py:FACTORY.")
    try:
        external = getattr(_import(source), factory)()
    except Exception as error:  # whatever the user's code raises
        raise ModelError(f"--external {name}: {type(error).__name__}: {error}.") from error
    missing = [attribute for attribute in ("encode", "decode", "codebook_size") if not hasattr(external, attribute)]
    if missing:
        raise ModelError(
            f"--external {name}: {type(external).__name__} has no {', '.join(missing)}; expected "
            "encode(images) -> ids, decode(ids) -> images and codebook_size."
        )
    label, codes = str(getattr(external, "name", factory)), int(external.codebook_size)

    def encode(images: Tensor) -> Tensor:
        with torch.inference_mode():
            ids = torch.as_tensor(external.encode(images)).long().cpu()
        if ids.ndim != 2 or len(ids) != len(images) or not 0 <= int(ids.min()) <= int(ids.max()) < codes:
            raise ModelError(
                f"--external {name}: encode returned {_describe(ids)} for {len(images)} images; expected "
                f"({len(images)}, L) in [0, {codes})."
            )
        return ids

    def decode(ids: Tensor, seeds: Sequence[int], size: tuple[int, int]) -> Tensor:
        with torch.inference_mode():
            images = torch.as_tensor(external.decode(ids)).float().cpu()
        if images.shape != (len(ids), 3, *size) or not images.isfinite().all():
            raise ModelError(
                f"--external {name}: decode returned {_describe(images)}; expected finite "
                f"({len(ids)}, 3, {size[0]}, {size[1]}) in [-1, 1]."
            )
        return images

    digest = getattr(external, "weights_digest", None)
    return Coder(label, label, "external", encode, decode, codes, {"external": name}, None, digest and str(digest))


def _import(source: str) -> Any:
    if not source.endswith(".py"):
        if "" not in sys.path:
            sys.path.insert(0, "")  # so that modules in the current folder are found, as by `python -m`
        return importlib.import_module(source)
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    if spec is None or spec.loader is None:
        raise ImportError(f"{source} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # the user's dataclasses need their module there
    spec.loader.exec_module(module)
    return module


def _describe(values: Tensor) -> str:
    return f"shape {tuple(values.shape)} with values {values.min():g} to {values.max():g}" if values.numel() else "none"
