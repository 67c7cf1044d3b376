"""The bodies of requests and responses: OpenAI's fields, and v2flow's under the names of the command line."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from v2flow_cli.serve.limits import MAX_IMAGES

MAX_SEED = 2**62  # the seeds of the further pictures must fit in 64 bits


def _size(text: str | None) -> str | None:
    if text in (None, "auto") or re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", text or ""):
        return text
    raise ValueError("expected auto or WIDTHxHEIGHT in pixels, such as 256x256")


def _rows(tokens: Any) -> Any:
    """One image's ids as a list of one row."""
    return [tokens] if isinstance(tokens, list) and tokens and not isinstance(tokens[0], list) else tokens


Size = Annotated[str | None, AfterValidator(_size), Field(description="WIDTHxHEIGHT in pixels, or auto.")]
Seed = Annotated[int | None, Field(ge=0, le=MAX_SEED, description="Default: random; the response has it.")]


class Request(BaseModel):
    """Base of all requests; an unknown parameter is an error."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = None
    user: str | None = Field(None, description="Accepted, without effect.")


class PictureRequest(Request):
    """The common fields of all requests for pictures."""

    seed: Seed = None
    size: Size = None
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    decoder: str | None = Field(None, description="One of the model's decoders, which /v1/models lists.")
    guidance_scale: float | None = Field(None, ge=0, le=20, description="Of the decoder; 1 means none.")
    num_mask_steps: int | None = Field(None, ge=1, le=32, description="Unmasking rounds.")
    num_flow_steps: int | None = Field(None, ge=1, le=100, description="ODE steps in each round.")

    @property
    def decoding(self) -> tuple[tuple[str, Any], ...]:
        """The decoder's settings as pairs; None means the decoder's default."""
        names = ("guidance_scale", "num_mask_steps", "num_flow_steps")
        return tuple((name, getattr(self, name)) for name in names)


class GenerationRequest(PictureRequest):
    """``POST /v1/images/generations``; picture i of n has seed + i."""

    prompt: str = Field(min_length=1, max_length=32_000)
    n: int = Field(1, ge=1, le=MAX_IMAGES)
    temperature: float | None = Field(None, ge=0, le=10)
    top_k: int | None = Field(None, ge=0, description="Keep the k likeliest tokens; 0 keeps all.")
    top_p: float | None = Field(None, ge=0, le=1)
    llm_guidance_scale: float | None = Field(None, ge=0, le=20, description="Of the LLM; 1 means none.")
    # Settings of OpenAI's models; only the values without effect are valid
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    stream: Literal[False] | None = None


class EncodeRequest(Request):
    """``POST /v1/images/tokens`` as JSON; the same fields, with files as ``image``, as a form."""

    image: str | list[str] = Field(description="Base64 of an image file, or a data URI; or a list of them.")
    num_tokens: int | None = Field(None, ge=1, description="One of the tokenizer's lengths.")
    refine_steps: int | None = Field(None, ge=0, le=100, description="Gradient steps on each image for better ids.")
    size: Size = None


class DecodeRequest(PictureRequest):
    """``POST /v1/tokens/images``; every image is decoded with the same seed."""

    tokens: Annotated[list[list[int]], BeforeValidator(_rows)] = Field(
        description="Token ids of an image, or a list of such lists."
    )
    tokenizer_digest: str | None = Field(None, description="Error if the tokens are from another tokenizer.")


class PictureData(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    seed: int


class PicturesResponse(BaseModel):
    created: int = Field(description="Seconds since 1970.")
    model: str
    size: str
    output_format: str
    data: list[PictureData]


class TokenData(BaseModel):
    tokens: list[int]


class TokensResponse(BaseModel):
    created: int
    model: str
    size: str
    codebook_size: int
    tokenizer_digest: str
    refine_steps: int
    data: list[TokenData]
