"""Errors as HTTP clients see them: OpenAI's shape, the right status, and what would work instead."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from headway.errors import InvalidInputError

log = logging.getLogger("headway.server")

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An answer other than 200. ``param`` is the request field at fault, ``code`` a stable short name."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = _printable(message)
        self.param = None if param is None else _printable(param)
        self.code = code
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


def _printable(text: str) -> str:
    """What a client wrote may come back in a message, and need not be Unicode text."""
    return text.encode(errors="backslashreplace").decode()


def invalid(param: str | None, message: str, code: str | None = "invalid_value") -> ApiError:
    """A 400 about one field."""
    return ApiError(400, message, param=param, code=code)


def from_invalid_input(error: InvalidInputError, param: str | None = None) -> ApiError:
    return invalid(param or error.argument, str(error))


def install(app: FastAPI) -> None:
    """Make every error that leaves the app take OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return _from_http(request, error).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return ApiError(
            500, "the server failed to answer this request; its log has the reason"
        ).response()


def _from_http(request: Request, error: HTTPException) -> ApiError:
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        message = (
            f"{where}: no such endpoint; there are /v1/completions, /v1/chat/completions, "
            "/v1/models, /health and /metrics"
        )
        return ApiError(404, message, code="unknown_url")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return ApiError(
            405,
            f"{where}: this endpoint takes {allowed}",
            code="method_not_allowed",
            headers=error.headers,
        )
    # Bodies that are no UTF-8, or nested too deeply, end here and not in pydantic.
    code = "invalid_json" if error.status_code == 400 else None
    return ApiError(error.status_code, f"{where}: {error.detail}", code=code, headers=error.headers)


# --- pydantic's errors, as sentences ------------------------------------------------------------------

_WANTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "finite_number": "a finite number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "literal_error": "one of {expected}",
}


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors; a body with several faults is repaired one by one."""
    error = errors[0]
    kind, ctx = error["type"], error.get("ctx") or {}
    if kind == "json_invalid":
        where = error["loc"][-1]
        detail = f"the body is not valid JSON: {ctx.get('error', 'unreadable')} (character {where})"
        return invalid(None, detail, "invalid_json")
    path = [str(part) for part in error["loc"] if part != "body"]
    if not path:
        return invalid(None, "the body must be a JSON object, sent as application/json")
    name = path[0] + "".join(f"[{p}]" if p.isdigit() else f".{p}" for p in path[1:])
    if kind == "missing":
        return invalid(name, f"{name}: missing, and it is required", "missing_required_parameter")
    if kind in ("value_error", "assertion_error"):
        got = _brief(error.get("input"))
        return invalid(name, f"{name}: got {got}; {ctx.get('error', error['msg'])}")
    wanted = _WANTED.get(kind)
    if wanted is None:
        return invalid(name, f"{name}: got {_brief(error.get('input'))}; {error['msg']}")
    return invalid(name, f"{name}: got {_brief(error.get('input'))}; want {wanted.format(**ctx)}")


def _brief(value: object) -> str:
    """As JSON writes it, where that is another word."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
