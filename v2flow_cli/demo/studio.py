"""The actions of the live demo's buttons: photos and prompts to token ids, editing ids, and ids to pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from v2flow_cli.bench import similarity
from v2flow_cli.bench.codebook_use import token_bytes
from v2flow_cli.bench.report import illustrations
from v2flow_cli.bench.report.token_view import TokenView, token_view
from v2flow_cli.errors import V2FlowError
from v2flow_cli.jobs.generate import load_models
from v2flow_cli.llm.sample import STOPPED, DrawingLM
from v2flow_cli.runtime.device import inference, pick_device, pick_dtype
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.preprocess import image_to_tensor, to_pil, to_uint8

GRID_WIDTH = 512  # pixels of the picture of the tokens
BY_LLM, ONE_CODE, RANDOM_CODES = "resampled by the language model", "one code", "random codes"
Rectangle = tuple[int, int, int, int]  # first row, first column, last row, last column, counted from 0


@dataclass(frozen=True)
class DecoderSettings:
    """The sampling settings of a decoder."""

    rounds: float
    steps: float
    guidance: float
    seed: float
    decoder: str | None = None
    noise: float | None = None  # factor on the initial noise; None: the decoder's


class Studio:
    """The models of the page."""

    _llm: DrawingLM | None

    def __init__(
        self, model: str | None = None, llm: str | None = None, device: str = "auto", decoder: str | None = None
    ) -> None:
        """Without ``llm`` it is the embedded one, or none (``draws``) if that draws tokens of another tokenizer.

        Raises:  ModelError if a model is missing, or if ``llm`` draws tokens of another tokenizer.
        """
        if llm is not None or model is None:
            self.tokenizer, self._llm, self.dtype = load_models(model, llm, device, decoder=decoder, option="--model")
        else:
            target = pick_device(device)
            self.dtype = pick_dtype("auto", target)
            self.tokenizer = V2FlowTokenizer.from_pretrained(model, decoder=decoder).to(target)
            embedded = DrawingLM.from_pretrained(None, target, self.dtype)
            fits = embedded.vocabulary.tokenizer_digest == self.tokenizer.token_digest
            self._llm = embedded if fits else None
        self.view: TokenView = token_view(self.tokenizer)
        self.size = self.tokenizer.config.image_size
        self.lengths = self.tokenizer.lengths(self.size, self.size)  # the default first
        self.codes = self.tokenizer.config.codebook_size

    @property
    def draws(self) -> bool:
        """True if there is an LLM that draws tokens of the tokenizer."""
        return self._llm is not None

    @property
    def llm(self) -> DrawingLM:
        """The LLM.  Raises: V2FlowError without one."""
        if self._llm is None:
            raise V2FlowError("No language model draws tokens of this tokenizer. Name one with --llm.")
        return self._llm

    @property
    def can_resample(self) -> bool:
        """True if images can be encoded to the LLM's number of tokens."""
        length = self.llm.vocabulary.tokens_per_image
        return length in self.lengths or (self.tokenizer.flexible and length <= self.lengths[0])

    def crop(self, photo: Image.Image | None) -> torch.Tensor:
        """The photo cropped for the encoder, (1, 3, H, W) in [-1, 1].  Raises: V2FlowError if there is none."""
        if photo is None:
            raise V2FlowError("No photo: drop one on the page, or choose one of the examples.")
        return image_to_tensor(photo.convert("RGB"), self.size)[None]

    def encode(
        self, images: torch.Tensor, num_tokens: float | None = None, refine_steps: int | None = None
    ) -> list[int]:
        """The token ids of one image."""
        with inference(self.tokenizer.device, self.dtype):
            ids = self.tokenizer.encode(images, None if num_tokens is None else int(num_tokens), refine_steps)
        return ids[0].tolist()

    def decode(self, ids: list[int], settings: DecoderSettings) -> torch.Tensor:
        """The image of token ids, (1, 3, H, W) in [-1, 1]."""
        with inference(self.tokenizer.device, self.dtype):
            return self.tokenizer.decode(
                torch.tensor([ids], device=self.tokenizer.device),
                height=self.size,
                width=self.size,
                num_mask_steps=int(settings.rounds),
                num_flow_steps=int(settings.steps),
                guidance_scale=settings.guidance,
                noise_temperature=settings.noise,
                seeds=[int(settings.seed)],
                decoder=settings.decoder,
            )

    def picture(self, images: torch.Tensor) -> Image.Image:
        """One image of pixels in [-1, 1]."""
        return to_pil(images)[0]

    def figures(self, ids: list[int], reference: torch.Tensor, images: torch.Tensor) -> str:
        """The size of the tokens in bytes, and the PSNR and SSIM of the image."""
        before, after = to_uint8(reference), to_uint8(images)
        return (
            f"{len(ids):,} tokens of {self.codes:,} codes: {token_bytes(len(ids), self.codes):,} bytes. "
            f"PSNR {similarity.psnr(before, after).item():.2f} dB, SSIM {similarity.ssim(before, after).item():.3f}."
        )

    def draw(self, prompt: str, temperature: float, seed: float) -> list[int]:
        """The token ids that the LLM writes for ``prompt``."""
        if not prompt.strip():
            raise V2FlowError('The prompt is empty. Expected a text such as "a red fox".')
        ids = self.llm.generate(prompt, seeds=int(seed), temperature=temperature)[0]
        return ids[ids != STOPPED].tolist()

    # -- tokens as a grid ----------------------------------------------------------------------------------

    def grid_shape(self, num_tokens: int) -> tuple[int, int]:
        """(rows, columns) of an image's tokens: the squarest grid of ``num_tokens`` cells."""
        return illustrations.token_grid_shape(num_tokens)

    def grid(self, ids: list[int], rectangle: Rectangle | None = None) -> Image.Image:
        """Each token as a square of its code's colour, row by row; ``rectangle`` has a border."""
        rows, columns = self.grid_shape(len(ids))
        side = GRID_WIDTH // columns
        colours = self.view.colours[np.array(ids)].reshape(rows, columns, 3)
        image = Image.fromarray(colours).resize((side * columns, side * rows), Image.Resampling.NEAREST)
        if rectangle is not None:
            top, left, bottom, right = (side * edge for edge in _edges(rectangle, rows, columns))
            pen = ImageDraw.Draw(image)
            for inset, colour in enumerate(("black", "white", "white", "white", "black")):
                pen.rectangle((left + inset, top + inset, right - 1 - inset, bottom - 1 - inset), outline=colour)
        return image

    def token_at(self, ids: list[int], x: float, y: float) -> tuple[int, int]:
        """Row and column of the token at a pixel of ``grid``."""
        rows, columns = self.grid_shape(len(ids))
        side = GRID_WIDTH // columns
        return min(int(y) // side, rows - 1), min(int(x) // side, columns - 1)

    def edit(
        self,
        ids: list[int],
        rectangle: Rectangle,
        how: str,
        *,
        code: float = 0,
        prompt: str = "",
        temperature: float = 1.0,
        seed: float = 0,
    ) -> list[int]:
        """``ids`` with the tokens inside ``rectangle`` replaced.

        The LLM writes from the first token to the last: it resamples a token from the prompt and the tokens before
        it, and does not use the tokens after it.
        Raises:  V2FlowError for a code that does not exist, or if the LLM draws another number of tokens.
        """
        rows, columns = self.grid_shape(len(ids))
        top, left, bottom, right = _edges(rectangle, rows, columns)
        mask = np.zeros((rows, columns), dtype=bool)
        mask[top:bottom, left:right] = True
        inside = torch.from_numpy(mask.ravel())
        edited = torch.tensor(ids)
        if how == ONE_CODE:
            if not 0 <= code < self.codes:
                raise V2FlowError(f"Code {code:g}: expected 0 to {self.codes - 1:,}.")
            edited[inside] = int(code)
        elif how == RANDOM_CODES:
            generator = torch.Generator().manual_seed(int(seed))
            edited[inside] = torch.randint(self.codes, (int(inside.sum()),), generator=generator)
        else:
            length = self.llm.vocabulary.tokens_per_image
            if len(ids) != length:
                raise V2FlowError(f"{len(ids)} tokens, but the language model writes {length}; encode with {length}.")
            outside = edited.masked_fill(inside, STOPPED)[None]
            edited = self.llm.generate(prompt, seeds=int(seed), temperature=temperature, fixed_ids=outside)[0]
        return edited.tolist()


def _edges(rectangle: Rectangle, rows: int, columns: int) -> Rectangle:
    """(top, left, bottom, right) inside the grid, bottom and right exclusive, from any two opposite corners."""
    row, column, other_row, other_column = (int(value) for value in rectangle)
    top, bottom = sorted((min(max(row, 0), rows - 1), min(max(other_row, 0), rows - 1)))
    left, right = sorted((min(max(column, 0), columns - 1), min(max(other_column, 0), columns - 1)))
    return top, left, bottom + 1, right + 1


def sampling_of(tokenizer: V2FlowTokenizer, decoder: str) -> list[Any]:
    """Rounds, flow steps, guidance scale and noise factor of a decoder's defaults."""
    sampling = tokenizer.with_decoder(decoder).config.section("sampling")
    return [sampling.num_mask_steps, sampling.num_flow_steps, sampling.guidance_scale, sampling.noise_temperature]
