"""Limits of one request and of all requests together: bytes, pixels, queue length, seconds."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import io
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image
from prometheus_client import Gauge
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from v2flow_cli.errors import DataError
from v2flow_cli.serve.errors import ApiError
from v2flow_cli.store.images import FORMATS, open_image

MAX_IMAGES = 10  # pictures of one request, as in OpenAI's API
OPEN_PATHS = ("/health", "/metrics", "/docs", "/openapi.json", "/v1/images/files/")  # need no key
DRAIN_SECONDS = 5.0  # time for reading and dropping the rest of a body that is too large


@dataclass(frozen=True)
class Limits:
    """The command's options; docs/serving.md has a table of them."""

    max_batch: int = 8  # rows in a batch
    max_waiting: int = 64  # rows in the queue; more requests get 429
    max_body_bytes: int = 10_000_000
    max_pixels: int = 16_000_000  # of an image in a request
    max_side: int = 512  # pixels, of an encoded or decoded image
    max_seconds: float = 120.0  # from the end of the body to the response
    max_body_seconds: float = 30.0
    url_seconds: float = 3600.0  # lifetime of a picture's URL
    url_bytes: int = 64_000_000  # of all pictures with URLs; the oldest are removed first


def read_picture(content: bytes, limits: Limits, param: str) -> Image.Image:
    """The picture in a file's bytes as RGB.  Raises: ApiError if it is not a picture, or has too many pixels."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
    except Exception:
        width = height = 0  # open_image raises the error
    if width * height > limits.max_pixels:
        raise ApiError(
            413,
            f"{param}: {width} x {height} is {width * height:,} pixels; the limit is {limits.max_pixels:,}. "
            "Make it smaller first.",
            param=param,
            code="image_too_large",
        )
    try:
        return open_image(content, param)
    except DataError as error:
        raise ApiError(400, str(error), param=param, code="invalid_image") from None


class Gate:
    """ASGI middleware: the API key, the end of the server, and limits on the size and the duration of bodies.

    All bodies in memory together may have four times the size limit of one body. Work that arrives while the server is
    ``closing`` is refused here, so that what arrived before is done, even if its body was still on the way.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, api_key: str | None, gauge: Gauge, closing: Callable[[], bool]
    ) -> None:
        self.app, self.limits, self.api_key, self.closing = app, limits, api_key, closing
        self.held = 0  # bytes of all bodies in memory
        gauge.set_function(lambda: self.held)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self.api_key and not scope["path"].startswith(OPEN_PATHS) and not self._knows_key(headers):
            await _drain(receive)
            message = "Incorrect or missing API key. Send it as `Authorization: Bearer KEY`."
            await ApiError(401, message).response()(scope, receive, send)
            return
        if scope["method"] == "POST" and self.closing():
            await _drain(receive)
            shutting_down = ApiError(503, "The server is shutting down. Send the request again later.", retry_after=5)
            await shutting_down.response()(scope, receive, send)
            return
        most = self.limits.max_body_bytes
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > most:
            await _drain(receive)
            await self._too_large(int(length)).response()(scope, receive, send)
            return
        body = 0
        deadline = asyncio.get_running_loop().time() + self.limits.max_body_seconds
        whole = False

        async def limited() -> Message:
            nonlocal body, whole
            if whole:  # the message after the body is the disconnect; it has no deadline
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - asyncio.get_running_loop().time())
            except asyncio.TimeoutError:
                raise ApiError(
                    408, f"The body did not arrive within {self.limits.max_body_seconds:g} s. Send the request again."
                ) from None
            size = len(message.get("body", b""))
            whole = message["type"] != "http.request" or not message.get("more_body", False)
            body, self.held = body + size, self.held + size
            if body > most:
                await _drain(receive)
                raise self._too_large(body)
            if self.held > 4 * most:
                raise ApiError(429, "Too many large request bodies at one time. Send the request again.", retry_after=1)
            return message

        try:
            await self.app(scope, limited, send)
        finally:
            self.held -= body

    def _too_large(self, size: int) -> ApiError:
        most = self.limits.max_body_bytes
        return ApiError(413, f"The body has {size:,} bytes or more; the limit is {most:,}. Send smaller images.")

    def _knows_key(self, headers: dict[bytes, bytes]) -> bool:
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(key.strip(), (self.api_key or "").encode())


async def _drain(receive: Receive) -> None:
    """Read and drop the rest of a body: a client reads the response only after it has sent the body."""

    async def drop() -> None:
        while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
            pass

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(drop(), DRAIN_SECONDS)
