"""The server's endpoints. Each checks its request, submits rows to the batcher, and makes the response."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from torch import Tensor

from v2flow_cli import __version__
from v2flow_cli.errors import DataError
from v2flow_cli.jobs.generate import Settings
from v2flow_cli.serve.batching import Batcher, QueueFull
from v2flow_cli.serve.errors import CLIENT_CLOSED_REQUEST, ApiError, install_handlers
from v2flow_cli.serve.limits import MAX_IMAGES, Gate, Limits, read_picture
from v2flow_cli.serve.metrics import Metrics, MetricsMiddleware
from v2flow_cli.serve.picture_urls import PictureUrls
from v2flow_cli.serve.schemas import (
    DecodeRequest,
    EncodeRequest,
    GenerationRequest,
    PictureData,
    PictureRequest,
    PicturesResponse,
    TokenData,
    TokensResponse,
)
from v2flow_cli.serve.tasks import Decode, Draw, Encode, Models
from v2flow_cli.store.images import image_bytes
from v2flow_cli.tokenizer.preprocess import image_to_tensor

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


class Service:
    """The shared state of the endpoints: the models, the queue, the pictures with URLs, the metrics."""

    def __init__(self, models: Models, limits: Limits) -> None:
        self.models, self.limits, self.metrics = models, limits, Metrics()
        self.batcher = Batcher(
            lambda task, payloads, tick: task.run(models, payloads, tick),
            max_rows=limits.max_batch,
            max_waiting=limits.max_waiting,
            on_batch=self.metrics.on_batch,
        )
        self.metrics.waiting.set_function(lambda: len(self.batcher.waiting))
        self.metrics.running.set_function(lambda: self.batcher.running)
        self.urls = PictureUrls(limits.url_seconds, limits.url_bytes)
        self.closing = False
        self.created = int(time.time())
        self._reading = asyncio.Semaphore(1)  # decoding a large photo takes 100 MB

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """The worker runs from the first request to the last."""
        worker = asyncio.create_task(self.batcher.run())
        yield
        worker.cancel()
        self.batcher.close()

    async def compute(self, request: HttpRequest, task: Any, payloads: Sequence[Any]) -> list[Any]:
        """Results for ``payloads``. They leave the queue if the client disconnects or after the time limit."""
        job = asyncio.ensure_future(self.batcher.submit(task, payloads))
        disconnect = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({job, disconnect}, timeout=self.limits.max_seconds, return_when=asyncio.FIRST_COMPLETED)
            if job.done():
                return job.result()
            if disconnect.done():
                raise ApiError(CLIENT_CLOSED_REQUEST, "The client disconnected.")
            seconds = f"{self.limits.max_seconds:g} s"
            raise ApiError(504, f"Not done within the limit of {seconds}. Request fewer images, or try again later.")
        except QueueFull as full:
            message = f"{len(self.batcher.waiting)} images are in the queue; the limit is {self.limits.max_waiting}."
            raise ApiError(429, f"{message} Try again later.", retry_after=full.retry_after) from None
        finally:
            job.cancel()
            disconnect.cancel()

    async def read(self, sources: Sequence[bytes], size: int) -> list[Tensor]:
        """Files as pixels (3, size, size), the centre of each picture; one file at a time."""

        def pixels(content: bytes, param: str) -> Tensor:
            return image_to_tensor(read_picture(content, self.limits, param), size)

        names = ["image"] if len(sources) == 1 else [f"image.{i}" for i in range(len(sources))]
        images = []
        for content, name in zip(sources, names):
            async with self._reading:
                images.append(await asyncio.to_thread(pixels, content, name))
        return images

    async def pictures(
        self, request: HttpRequest, body: PictureRequest, images: Sequence[Image.Image], seeds: Sequence[int]
    ) -> PicturesResponse:
        """The response with ``images``, as base64 or as URLs."""
        suffix = body.output_format
        files = await asyncio.to_thread(lambda: [image_bytes(image, suffix.upper()) for image in images])
        data = []
        for content, seed in zip(files, seeds):
            if body.response_format == "url":
                url = request.url_for("picture_file", name=self.urls.add(content, suffix))
                data.append(PictureData(url=str(url), seed=seed))
            else:
                data.append(PictureData(b64_json=base64.b64encode(content).decode(), seed=seed))
        width, height = images[0].size
        return PicturesResponse(
            created=int(time.time()),
            model=self.models.name,
            size=f"{width}x{height}",
            output_format=suffix,
            data=data,
        )

    def check_model(self, name: str | None, decoder: str | None = None) -> None:
        """Raises: ApiError for the name of another model, or for a decoder that the model does not have."""
        if name not in (None, self.models.name):
            message = f"The model {name[:100]!a} does not exist here; this server has {self.models.name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")
        names = self.models.tokenizer.decoder_names
        if decoder not in (None, *names):
            message = f"decoder: expected {' or '.join(names)}; found {(decoder or '')[:100]!a}."
            raise ApiError(400, message, param="decoder")

    def about(self) -> dict[str, Any]:
        """The entry of the model in /v1/models."""
        tokenizer, (height, width) = self.models.tokenizer, self.models.picture_size
        return {
            "id": self.models.name,
            "object": "model",
            "created": self.created,
            "owned_by": "v2flow",
            "size": f"{width}x{height}",
            "tokens_per_image": self.models.llm.vocabulary.tokens_per_image,
            "decoders": list(tokenizer.decoder_names),
            "codebook_size": tokenizer.config.codebook_size,
            "tokenizer_digest": self.models.token_digest,
        }


def create_app(models: Models, limits: Limits | None = None, api_key: str | None = None) -> FastAPI:
    """The ASGI application that serves ``models``; ``app.state.service`` is its Service."""
    limits = limits or Limits()
    service = Service(models, limits)
    app = FastAPI(title="v2flow", version=__version__, lifespan=service.lifespan)
    app.state.service = service
    gauge, closing = service.metrics.body_bytes, lambda: service.closing
    app.add_middleware(Gate, limits=limits, api_key=api_key, gauge=gauge, closing=closing)
    app.add_middleware(MetricsMiddleware, metrics=service.metrics)
    install_handlers(app)

    @app.get("/health")
    async def health() -> JSONResponse:
        """``{"status": "ok"}`` if the server accepts requests; 503 while it shuts down."""
        status = "closing" if service.closing else "ok"
        return JSONResponse({"status": status, "model": models.name}, 503 if service.closing else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [service.about()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.about()

    @app.get("/v1/images/files/{name}")
    async def picture_file(name: str) -> Response:
        """A picture of a request with ``response_format: url``."""
        content = service.urls.get(name)
        if content is None:
            minutes = limits.url_seconds / 60
            raise ApiError(404, f"No such picture; the lifetime of URLs is {minutes:g} minutes at most. Draw it again.")
        headers = {"Cache-Control": "private", "X-Content-Type-Options": "nosniff"}
        return Response(content, media_type=MEDIA_TYPES[name.rpartition(".")[2]], headers=headers)

    @app.post("/v1/images/generations")
    async def generations(body: GenerationRequest, request: HttpRequest) -> PicturesResponse:
        """Pictures from a prompt."""
        service.check_model(body.model, body.decoder)
        height, width = models.picture_size
        if body.size not in (None, "auto", f"{width}x{height}"):
            message = f"size: this model draws {width}x{height}; found {body.size}. Omit it, or send auto."
            raise ApiError(400, message, param="size")
        if not body.prompt.strip():
            raise ApiError(400, 'prompt: empty; expected a text such as "a red fox".', param="prompt")
        try:
            models.llm.prompt(body.prompt)
        except DataError as error:
            raise ApiError(400, str(error), param="prompt", code="prompt_too_long") from None
        first = secrets.randbelow(2**31) if body.seed is None else body.seed
        seeds = [first + i for i in range(body.n)]
        defaults = models.llm.sampling
        settings = Settings(
            top_k=defaults.top_k if body.top_k is None else body.top_k,
            top_p=defaults.top_p if body.top_p is None else body.top_p,
            llm_guidance_scale=defaults.guidance_scale if body.llm_guidance_scale is None else body.llm_guidance_scale,
            **dict(body.decoding),
        )
        temperature = defaults.temperature if body.temperature is None else body.temperature
        rows = [(body.prompt, seed, temperature) for seed in seeds]
        images = await service.compute(request, Draw(settings, body.decoder), rows)
        return await service.pictures(request, body, images, seeds)

    @app.post("/v1/images/tokens", openapi_extra=_form_or_json())
    async def encode(request: HttpRequest) -> TokensResponse:
        """Token ids of images; a form with files as ``image``, or JSON."""
        body, files = await _encode_request(request)
        service.check_model(body.model)
        tokenizer = models.tokenizer
        height, width = _sides(body.size, service)
        if height != width:
            raise ApiError(400, f"size: {body.size} is not square.", param="size")
        try:
            tokenizer.check_length(body.num_tokens or tokenizer.num_tokens(height, width), height, width)
        except ValueError as error:
            param = "num_tokens" if body.num_tokens else "size"
            raise ApiError(400, f"{param}: {error}.", param=param) from None
        pixels = await service.read(files, height)
        ids = await service.compute(request, Encode(height, width, body.num_tokens, body.refine_steps), pixels)
        return TokensResponse(
            created=int(time.time()),
            model=models.name,
            size=f"{width}x{height}",
            codebook_size=tokenizer.config.codebook_size,
            tokenizer_digest=models.token_digest,
            refine_steps=tokenizer.steps_to_refine(body.num_tokens, body.refine_steps),
            data=[TokenData(tokens=row) for row in ids],
        )

    @app.post("/v1/tokens/images")
    async def decode(body: DecodeRequest, request: HttpRequest) -> PicturesResponse:
        """Images of token ids."""
        service.check_model(body.model, body.decoder)
        if body.tokenizer_digest not in (None, models.token_digest):
            message = f"tokens of tokenizer {body.tokenizer_digest[:40]!a}; this server has {models.token_digest}."
            raise ApiError(400, message, param="tokenizer_digest", code="other_tokenizer")
        height, width = _sides_of_tokens(body.tokens, body.size, service)
        seed = secrets.randbelow(2**31) if body.seed is None else body.seed
        task = Decode(height, width, len(body.tokens[0]), body.decoder, body.decoding)
        images = await service.compute(request, task, [(row, seed) for row in body.tokens])
        return await service.pictures(request, body, images, [seed] * len(images))

    return app


def _form_or_json() -> dict[str, Any]:
    """OpenAPI schema of an endpoint that accepts JSON or a form; FastAPI cannot infer it from a signature."""
    form = {"properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}}}
    form["properties"] |= {
        "num_tokens": {"type": "integer"},
        "refine_steps": {"type": "integer"},
        "size": {"type": "string"},
    }
    schemas = {"application/json": EncodeRequest.model_json_schema(), "multipart/form-data": form}
    return {"requestBody": {"required": True, "content": {kind: {"schema": s} for kind, s in schemas.items()}}}


async def _encode_request(request: HttpRequest) -> tuple[EncodeRequest, list[bytes]]:
    """The request and its files.  Raises: ApiError, RequestValidationError."""
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        async with request.form(max_files=MAX_IMAGES, max_fields=MAX_IMAGES) as form:
            uploads = [v for k, v in form.multi_items() if k in ("image", "image[]") and isinstance(v, UploadFile)]
            fields = {k: v for k, v in form.multi_items() if not isinstance(v, UploadFile)}
            body = _validated({**fields, "image": [upload.filename or "" for upload in uploads]})
            files = [await upload.read() for upload in uploads]
    else:
        try:
            fields = await request.json()
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"The body is not a form and not valid JSON ({error}).", code="invalid_json") from None
        body = _validated(fields)
        texts = [body.image] if isinstance(body.image, str) else body.image
        files = [_from_base64(text) for text in texts[: MAX_IMAGES + 1]]
    if not 1 <= len(files) <= MAX_IMAGES:
        message = f"image: {len(files)} images; expected 1 to {MAX_IMAGES}."
        raise ApiError(400, message, param="image")
    return body, files


def _validated(fields: Any) -> EncodeRequest:
    try:
        return EncodeRequest.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def _from_base64(text: str) -> bytes:
    """The bytes of base64 text or a data URI.  Raises: ApiError."""
    if text.startswith(("http://", "https://")):
        message = "image: URLs are not supported. Send the file as base64 or in a form."
        raise ApiError(400, message, param="image")
    encoded = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        message = f"image: not base64 ({error}). Send the bytes of an image file as base64, or in a form."
        raise ApiError(400, message, param="image", code="invalid_base64") from None


def _sides(size: str | None, service: Service) -> tuple[int, int]:
    """Height and width in pixels of ``size``; default: the model's.  Raises: ApiError above the limit."""
    if size in (None, "auto"):
        return (service.models.tokenizer.config.image_size,) * 2
    width, height = map(int, size.split("x"))
    if max(height, width) > service.limits.max_side:
        message = f"size: {size} exceeds the limit of {service.limits.max_side} pixels for a side."
        raise ApiError(400, message, param="size")
    return height, width


def _sides_of_tokens(rows: Sequence[Sequence[int]], size: str | None, service: Service) -> tuple[int, int]:
    """Height and width in pixels of the images of ``rows`` of token ids.  Raises: ApiError."""
    tokenizer = service.models.tokenizer
    lengths, codes = sorted(set(map(len, rows))), tokenizer.config.codebook_size
    problem = None
    if not 1 <= len(rows) <= MAX_IMAGES:
        problem = f"{len(rows)} images; expected 1 to {MAX_IMAGES}"
    elif len(lengths) > 1:
        problem = f"rows of {' and '.join(map(str, lengths))} ids; all rows of a request must have one length"
    elif any(not 0 <= number < codes for row in rows for number in row):
        problem = f"ids must be in the range 0 to {codes - 1}"
    if problem is None:
        try:
            height, width = tokenizer.grid_of(lengths[0]) if size in (None, "auto") else _sides(size, service)
            tokenizer.check_length(lengths[0], height, width)
            if max(height, width) <= service.limits.max_side:
                return height, width
            problem = f"the image of {lengths[0]} ids exceeds the limit of {service.limits.max_side} pixels for a side"
        except ValueError as error:
            problem = str(error)
    raise ApiError(400, f"tokens: {problem}.", param="tokens")


async def _disconnected(request: HttpRequest) -> None:
    """Returns when the client disconnects; call it after the body is read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
