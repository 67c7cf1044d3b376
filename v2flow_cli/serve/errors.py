"""Every failure in the error format of OpenAI's API, with its status code."""

from __future__ import annotations

import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

CLIENT_CLOSED_REQUEST = 499  # for the metrics only
TYPES = {401: "authentication_error", 429: "rate_limit_error"}
CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    429: "rate_limit_exceeded",
    503: "server_shutting_down",
    504: "timeout",
}
MAX_VALUE_CHARS = 60  # of a value in a message


class ApiError(HTTPException):  # FastAPI passes on its own class when it reads the body
    """A failure that ends a request with ``status`` and an error object; ``param`` is the invalid field."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(status, message)
        self.param, self.code = param, code or CODES.get(status)
        self.retry_after = retry_after  # seconds

    def response(self) -> JSONResponse:
        """``{"error": {"message", "type", "param", "code"}}``, with Retry-After if a later request can succeed."""
        kind = TYPES.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        content = {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        if self.status_code == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(content, self.status_code, headers)


def install_handlers(app: FastAPI) -> None:
    """Failures of the app, of the framework and of v2flow all get the same format."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return of_validation(error.errors()[0]).response()

    @app.exception_handler(HTTPException)
    async def framework(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error, ApiError):
            return error.response()
        message = str(error.detail)
        if error.status_code == 404:
            message = f"{request.method} {request.url.path}: no such endpoint. GET /docs lists them."
        elif error.status_code == 405:
            message = f"{request.method} is not allowed at {request.url.path}. GET /docs lists the endpoints."
        return ApiError(error.status_code, message).response()

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:  # the traceback is in the server's log
        return ApiError(500, "Internal error. The server's log has the traceback.", code="internal_error").response()


def of_validation(error: Any) -> ApiError:
    """The first error of pydantic as one sentence."""
    names = [str(part) for part in error["loc"] if part not in ("body", "query", "path")]
    param = ".".join(names) or None
    if error["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: {param!a}.", param=param, code="unknown_parameter")
    if error["type"] == "missing":
        message = f"Missing required parameter: {param!a}." if param else "The body is empty; send a JSON object."
        return ApiError(400, message, param=param, code="missing_required_parameter")
    if error["type"] == "json_invalid":
        reason = error.get("ctx", {}).get("error", error["msg"])
        return ApiError(400, f"The body is not valid JSON: {reason}.", code="invalid_json")
    if not names:
        advice = "Send a JSON object, with `Content-Type: application/json`."
        return ApiError(400, f"The body is not a JSON object. {advice}", code="invalid_json")
    value = ascii(error.get("input"))
    value = value if len(value) <= MAX_VALUE_CHARS else f"{value[:MAX_VALUE_CHARS]}..."
    return ApiError(400, f"{param or 'body'}: {error['msg']}; found {value}.", param=param)
