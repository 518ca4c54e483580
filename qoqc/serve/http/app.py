"""The routes.

Not the app of `transformers serve`: that takes any model a request names and loads it, has open
routes that load and unload models, knows no key, no limits and no queue bound, ignores stop strings
and usage in streams, and shares the first request's sampling with all others; its handlers and
managers are private, so each of these would have to be patched in. What it gives is the engine, and
that is transformers' own here, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response

from qoqc.serve.http.answer import Answer
from qoqc.serve.http.driver import Job
from qoqc.serve.http.errors import ApiError
from qoqc.serve.http.guard import KeyGuard, read_body
from qoqc.serve.http.metrics import CONTENT_TYPE
from qoqc.serve.http.parse import Kind, parse
from qoqc.serve.http.prompts import chat_job, completion_job
from qoqc.serve.http.protocol import ChatRequest, CompletionRequest
from qoqc.serve.http.service import Service
from qoqc.serve.http.wording import ChatWording, Wording


def build_app(service: Service) -> FastAPI:
    """The ASGI app of a service; its engine must run, and stops when the app does."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.driver.stop)

    key = service.settings.api_key
    app = FastAPI(
        title="qoqc",
        lifespan=lifespan,
        openapi_url=None,
        middleware=[] if key is None else [Middleware(KeyGuard, api_key=key)],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            Exception: _bug,
        },
    )

    @app.get("/health")
    async def health() -> Response:
        alive = service.driver.alive
        return JSONResponse({"status": "ok" if alive else "engine dead"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(service, name)
        return _model(service)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(
            service, "completions", request, CompletionRequest, completion_job, Wording
        )

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer(service, "chat", request, ChatRequest, chat_job, ChatWording)

    return app


async def _answer(
    service: Service,
    route: str,
    request: Request,
    kind: type[Kind],
    make_job: Callable[..., Job],
    wording: type[Wording],
) -> Response:
    """What will answer a request. Raises ApiError for one that is refused as it stands."""
    settings = service.settings
    try:
        body = parse(await read_body(request, settings.max_body, settings.timeout), kind)
        _check_model(service, body.model)
        words = wording(body.model, body.with_usage())
        return Answer(service, route, partial(make_job, body), words, bool(body.stream))
    except ApiError as error:
        service.metrics.answered(route, str(error.status))
        raise


def _model(service: Service) -> dict[str, Any]:
    name, created = service.settings.model_name, service.created
    return {"id": name, "object": "model", "created": created, "owned_by": "qoqc"}


def _check_model(service: Service, name: str) -> None:
    own = service.settings.model_name
    if name != own:
        message = f"the model {name!r} is not served here, {own!r} is"
        raise ApiError(404, message, param="model", code="model_not_found")


async def _api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(_request: Request, error: Exception) -> Response:
    """What the router refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, error.detail, headers=dict(error.headers or {})).response()


async def _bug(_request: Request, _error: Exception) -> Response:
    """Starlette raises the error again afterwards, and uvicorn logs it."""
    return ApiError(500, "the server failed; its log says how").response()
