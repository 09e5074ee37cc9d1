"""Errors as OpenAI writes them: `{"error": {"message", "type", "param", "code"}}`. No prompt or key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

INVALID = "invalid_request_error"
UNSUPPORTED = "unsupported_parameter"


class ApiError(Exception):
    """A refusal that the client sees: HTTP status, message, OpenAI's `code` and `param`, extra headers."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of this error."""
        return {
            "error": {"message": self.message, "type": self._type, "param": self.param, "code": self.code}
        }

    @property
    def response(self) -> JSONResponse:
        """The HTTP response of this error."""
        return JSONResponse(self.body, self.status, headers=self.headers)

    @property
    def _type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else INVALID


def unsupported(param: str) -> ApiError:
    """A parameter of OpenAI's that this server does not have: said, never silently ignored."""
    return ApiError(400, f"'{param}' is not supported by this server; leave it out", UNSUPPORTED, param)


def printable(name: str) -> str:
    """A name that came from outside, short and safe to write into an answer."""
    return name[:64].encode("ascii", "backslashreplace").decode()


def busy(seconds: int = 1) -> ApiError:
    """The queue is full."""
    message = f"the queue is full; try again in {seconds} s"
    return ApiError(429, message, "queue_full", headers={"Retry-After": str(seconds)})


def unavailable(message: str) -> ApiError:
    """Nothing is generated here any more."""
    return ApiError(503, message, "unavailable")


def install(app: FastAPI) -> None:
    """Give every error of `app` OpenAI's shape: ours, validation, unknown route, wrong method."""

    @app.exception_handler(ApiError)
    async def refuse(_: Request, e: ApiError) -> JSONResponse:
        return e.response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, e: RequestValidationError) -> JSONResponse:
        return from_validation(e.errors()).response

    @app.exception_handler(HTTPException)
    async def http(request: Request, e: HTTPException) -> JSONResponse:
        known = {404: "this server has no such route", 405: f"this route does not take {request.method[:16]}"}
        code = {404: "route_not_found", 405: "method_not_allowed"}.get(e.status_code)
        return ApiError(
            e.status_code, known.get(e.status_code, str(e.detail)), code, headers=e.headers
        ).response


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors, as a 400 that names the field and not its value."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}", "invalid_json")
    parts = [str(p) for p in first["loc"][1:]]
    path = (
        printable(".".join(p for p in parts if p.isdigit() or p.isidentifier())) or None
    )  # without union tags
    if path is None:
        return ApiError(
            400, "the body must be a JSON object (Content-Type: application/json)", "invalid_json"
        )
    if first["type"] == "missing":
        return ApiError(400, f"'{path}' is missing", "missing_required_parameter", path)
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"'{path}': {message[:1].lower()}{message[1:]}", "invalid_value", path)
