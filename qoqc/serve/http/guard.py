"""Who and what comes in at all: the API key of every route, and a body within its limit."""

from __future__ import annotations

import asyncio
import hmac

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from qoqc.serve.http.errors import ApiError

OPEN_PATHS = ("/health",)
"""Paths without a key: load balancers ask there, and it says only whether the server works."""


CLOSE = {"Connection": "close"}
"""For answers to bodies that were not read to their end: no other request can follow them."""


class KeyGuard:
    """ASGI middleware: 401 for every request without the key."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        """The key is what `Authorization: Bearer` must hold."""
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("authorization", "").encode("latin-1")
        # takes as long for a key that is nearly right as for one that is not
        if hmac.compare_digest(given, self._expected):
            await self._app(scope, receive, send)
            return
        refusal = ApiError(
            401,
            "the API key is missing or wrong: it goes into the header Authorization: Bearer",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await refusal.response()(scope, receive, send)


async def read_body(request: Request, limit: int, timeout: float) -> bytes:
    """The body of a JSON request.

    Raises ApiError 413 beyond `limit` bytes, 408 after `timeout` seconds, 415 for other types.

    The type is checked because a web page may send other types to any server, also one that
    listens on this machine only, without asking that server first.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be JSON, with Content-Type: application/json")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit)
    try:
        return await asyncio.wait_for(_read(request, limit), timeout)
    except asyncio.TimeoutError as error:
        message = f"the body did not arrive within {timeout:g} s"
        raise ApiError(408, message, code="timeout", headers=CLOSE) from error
    except ClientDisconnect as error:
        raise ApiError(400, "the client went away before its request was complete") from error


async def _read(request: Request, limit: int) -> bytes:
    parts = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
    return b"".join(parts)


def _too_large(limit: int) -> ApiError:
    message = f"the body has more than {limit} bytes"
    return ApiError(413, message, code="body_too_large", headers=CLOSE)
