"""From a free port to the end of the process: bind, serve, finish what is open, stop."""

from __future__ import annotations

import ipaddress
import resource
import signal
import socket
from types import FrameType

import uvicorn

from qoqc.errors import Unsupported
from qoqc.serve.http.app import build_app
from qoqc.serve.http.service import Service

BACKLOG = 2048
"""Connections that wait to be accepted: all of a burst of clients."""


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to a free address, port 0 takes any; nobody can connect before `serve`.

    Bound before a model is loaded, so that a port in use is known at once. Raises Unsupported.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise Unsupported(f"--host {host}: {error}") from error
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise Unsupported(f"{host}:{port} cannot be listened on: {error}") from error
    return bound


def address_of(bound: socket.socket) -> str:
    """http://HOST:PORT of a socket of `bind`."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine can connect."""
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


def make_server(service: Service) -> uvicorn.Server:
    """The server; `serve(service, bound)` runs it, tests run it in a thread."""
    config = uvicorn.Config(
        build_app(service),
        backlog=BACKLOG,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(round(service.settings.grace), 1),
    )
    return uvicorn.Server(config)


def serve(service: Service, bound: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C; open requests have `grace` seconds to finish then.

    Returns after SIGTERM; raises KeyboardInterrupt after Ctrl-C, as uvicorn passes signals on.
    The service's engine must run; it is stopped in any case.
    """
    _allow_connections()
    # uvicorn raises the signal again when all is done: its default action would be to be killed
    before = signal.signal(signal.SIGTERM, _ignore)
    try:
        make_server(service).run(sockets=[bound])
    finally:
        signal.signal(signal.SIGTERM, before)
        service.driver.stop()


def _ignore(_number: int, _frame: FrameType | None) -> None:
    pass


def _allow_connections() -> None:
    """As many open files as the system grants: a connection is one, and 1,024 a common limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
