"""The answer to one request, whole or streamed, with an eye on the client all the time.

An ASGI response of its own, because Starlette's streaming response sends its headers before the
first piece is there: here an error before that still has its status. A client that goes away is
noticed while the answer is waited for as well, and its request leaves the engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Literal

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from qoqc.log import get_logger
from qoqc.serve.http.driver import Generation
from qoqc.serve.http.errors import ApiError
from qoqc.serve.http.service import MakeJob, Piece, Service
from qoqc.serve.http.wording import Wording, usage

log = get_logger("serve")

READING = 30.0
"""Seconds that a client has to read an answer which was complete at the last moment.

A client that does not read keeps its place among the open requests no longer than that.
"""

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the pieces
]


class Answer(Response):
    """Runs a request when it is called as an ASGI app."""

    def __init__(
        self, service: Service, route: str, make: MakeJob, wording: Wording, stream: bool
    ) -> None:
        """route: its name in the metrics."""
        super().__init__()
        self._service = service
        self._route = route
        self._make = make
        self._wording = wording
        self._stream = stream
        self._state: Literal["waiting", "streaming", "complete"] = "waiting"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI. The body must have been read already."""
        work = asyncio.ensure_future(self._respond(scope, receive, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        outcome, cut_off = "cancelled", False
        longest = self._service.settings.timeout + READING
        try:
            await asyncio.wait({work, gone}, timeout=longest, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                outcome = work.result()
        except asyncio.CancelledError:
            cut_off = True
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if cut_off:
            # uvicorn cancels what is still open when its time for a shutdown is over
            late = ApiError(503, "the server shut down before the answer was complete")
            await self._send_error(late, scope, receive, send)
            outcome = str(late.status)
        self._service.metrics.answered(self._route, outcome)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> str:
        """Send the answer or the error; returns the outcome for the metrics."""
        try:
            with self._service.admission():
                await self._run(scope, receive, send)
            return "ok"
        except ApiError as error:
            failure = error
        except Exception:
            log.exception("%s failed", self._route)
            failure = ApiError(500, "the server failed; its log says how")
        await self._send_error(failure, scope, receive, send)
        return str(failure.status)

    async def _send_error(
        self, error: ApiError, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if self._state == "streaming":
            await send(_part(error.event(), more=False))
        elif self._state == "waiting":
            await error.response()(scope, receive, send)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, start = self._service, time.perf_counter()
        deadline = asyncio.get_running_loop().time() + service.settings.timeout
        job = await service.job(self._make)
        generation = service.driver.submit(job)
        timer = service.limit_time(generation, deadline)
        try:
            pieces = service.pieces(generation)
            if self._stream:
                await self._send_stream(generation, pieces, send)
            else:
                whole = await self._whole(generation, pieces)
                self._state = "complete"
                await whole(scope, receive, send)
        finally:
            timer.cancel()
            generation.cancel()
            end, times = time.perf_counter(), generation.times
            service.metrics.generated(len(job.prompt), generation.count, start, times, end)

    async def _whole(self, generation: Generation, pieces: AsyncIterator[Piece]) -> Response:
        parts = [piece async for piece in pieces]
        text, reason = "".join(part.text for part in parts), parts[-1].reason
        assert reason is not None  # the last piece has it
        return JSONResponse(self._wording.whole(text, reason, _usage(generation)))

    async def _send_stream(
        self, generation: Generation, pieces: AsyncIterator[Piece], send: Send
    ) -> None:
        async for piece in pieces:
            chunk = self._wording.piece(piece.text, piece.reason)
            if self._state == "waiting":
                self._state = "streaming"
                await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                chunk = self._wording.opening() + chunk
            await send(_part(chunk, more=True))
        self._state = "complete"
        await send(_part(self._wording.closing(_usage(generation)), more=False))


def _usage(generation: Generation) -> dict[str, int]:
    return usage(len(generation.job.prompt), generation.count)


def _part(body: bytes, *, more: bool) -> dict[str, object]:
    return {"type": "http.response.body", "body": body, "more_body": more}


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
