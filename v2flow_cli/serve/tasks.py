"""The tasks of the worker: pictures from prompts, ids from images, images from ids. Equal tasks share batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from v2flow_cli.jobs.generate import Picture, Settings, draw_images, load_models
from v2flow_cli.llm.sample import DrawingLM
from v2flow_cli.llm.sampling import DEFAULT_LLM
from v2flow_cli.runtime.device import inference
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.preprocess import to_pil

Tick = Callable[[], None]


@dataclass(frozen=True)
class Models:
    """A tokenizer and an LLM that draws its tokens, loaded once."""

    tokenizer: V2FlowTokenizer
    llm: DrawingLM
    dtype: torch.dtype
    name: str  # the id in the API
    token_digest: str

    @classmethod
    def load(cls, tokenizer: str | None, llm: str | None, device: str = "auto", dtype: str = "auto") -> Models:
        """From folders or hub ids; None is the embedded model.

        Raises:  ModelError if one is missing, or if the LLM draws tokens of another tokenizer.
        """
        models = load_models(tokenizer, llm, device, dtype)
        path = Path(models.llm.name)
        return cls(*models, "v2flow-default" if path == DEFAULT_LLM else path.name, models.tokenizer.token_digest)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width in pixels of the LLM's pictures."""
        return self.tokenizer.grid_of(self.llm.vocabulary.tokens_per_image)


@dataclass(frozen=True)
class Draw:
    """Payloads (prompt, seed, temperature) to images."""

    settings: Settings
    decoder: str | None

    def run(self, models: Models, payloads: Sequence[tuple[str, int, float]], tick: Tick) -> list[Image.Image]:
        pictures = [Picture(prompt, seed, temperature, "", "") for prompt, seed, temperature in payloads]
        tokenizer = models.tokenizer.with_decoder(self.decoder)
        pairs = draw_images(models.llm, tokenizer, pictures, self.settings, models.dtype, tick)
        return [image for _, image in pairs]


@dataclass(frozen=True)
class Encode:
    """Payloads (3, H, W) in [-1, 1] to lists of token ids; None are the tokenizer's defaults."""

    height: int
    width: int
    num_tokens: int | None
    refine_steps: int | None

    def run(self, models: Models, payloads: Sequence[Tensor], tick: Tick) -> list[list[int]]:
        images = torch.stack(list(payloads)).to(models.tokenizer.device)
        with inference(models.tokenizer.device, models.dtype):
            return models.tokenizer.encode(images, self.num_tokens, self.refine_steps).tolist()


@dataclass(frozen=True)
class Decode:
    """Payloads (token ids, seed) to images; ``sampling``: pairs of a name and a value, None for the default."""

    height: int
    width: int
    num_tokens: int
    decoder: str | None
    sampling: tuple[tuple[str, Any], ...]

    def run(self, models: Models, payloads: Sequence[tuple[list[int], int]], tick: Tick) -> list[Image.Image]:
        ids = torch.tensor([ids for ids, _ in payloads], device=models.tokenizer.device)
        with inference(models.tokenizer.device, models.dtype):
            images = models.tokenizer.decode(
                ids,
                height=self.height,
                width=self.width,
                seeds=[seed for _, seed in payloads],
                decoder=self.decoder,
                **dict(self.sampling),
            )
        return to_pil(images)
