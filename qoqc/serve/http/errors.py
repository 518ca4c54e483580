"""Errors as OpenAI's API words them: a status and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse


class ApiError(Exception):
    """A request that is not answered with a result; `headers` go with the response."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON object that clients parse."""
        return {
            "error": {
                "message": self.message,
                "type": _kind(self.status),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The whole response."""
        return JSONResponse(self.body(), self.status, self.headers)

    def event(self) -> bytes:
        """The server-sent event for an answer that has begun already."""
        return b"data: " + json.dumps(self.body()).encode() + b"\n\n"


def _kind(status: int) -> str:
    names = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    fallback = "server_error" if status >= 500 else "invalid_request_error"
    return names.get(status, fallback)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Status 400: the request itself is wrong, `param` says where."""
    return ApiError(400, message, param=param, code=code)
