"""The FastAPI application that all servers of the workbench build on, and the process that serves it.

Pages of other origins cannot use it: there is no CORS, requests that change or compute something must come from its own
pages or from a program, and its pages load nothing from elsewhere.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Collection
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

from utils.errors import UserError
from utils.machine.signals import StopSignal
from utils.web.errors import ErrorBody, answer_errors
from utils.web.guard import Guard, Running, is_loopback

BACKLOG = 2048  # connections that wait to be accepted
DRAIN_SECONDS = 20.0  # that running requests have to finish after the signal to end


def create_app(
    title: str, *, api_key: str | None = None, loopback: bool = True, open_paths: Collection[str] = ()
) -> FastAPI:
    """Create an app without routes, with the checks of `Guard`, errors as JSON and a description at /openapi.json.

    Its handlers may raise UserError (400) and ApiError. Static files belong below /static/.

    Args:
        api_key, loopback, open_paths: see `Guard`.
    """
    app = FastAPI(
        title=title,
        docs_url=None,  # FastAPI's pages would load their scripts from elsewhere
        redoc_url=None,
        responses={"4XX": {"model": ErrorBody, "description": "a mistake in the request"}},
    )
    app.state.running = Running()
    answer_errors(app)
    app.add_middleware(
        Guard, running=app.state.running, api_key=api_key, loopback=loopback, open_paths=tuple(open_paths)
    )
    return app


class _Server(uvicorn.Server):
    """After the first signal, running requests finish and new ones are refused; a second signal ends the server."""

    def __init__(self, config: uvicorn.Config, running: Running) -> None:
        super().__init__(config)
        self._running = running
        self._end = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._running.draining or not self.started:
            super().handle_exit(sig, frame)
            self.force_exit = True
            return
        self._captured_signals.append(sig)
        self._running.draining = True
        self._end = time.monotonic() + DRAIN_SECONDS

    async def on_tick(self, counter: int) -> bool:
        if self._running.draining and (self._running.count == 0 or time.monotonic() > self._end):
            return True
        return await super().on_tick(counter)


def run_server(app: FastAPI, host: str, port: int) -> NoReturn:
    """Serve an app made by `create_app` until a signal; prints the address.

    Args:
        port: 0: any free one.

    Raises:
        UserError: the address is in use, or does not belong to this machine.
        StopSignal: at the end, with the signal that ended the server.
    """
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, ws="none", server_header=False, timeout_graceful_shutdown=1
    )
    server = _Server(config, app.state.running)
    with bind(host, port) as listener:
        address = listener.getsockname()
        name = f"[{host}]" if ":" in host else host
        print(f"{app.title}: http://{name}:{address[1]}/ (Ctrl-C ends it)", flush=True)
        # uvicorn raises the signal again once it is done. In a script's background job, SIGINT would then be ignored.
        previous = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            server.run(sockets=[listener])
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    raise RuntimeError("the server ended without a signal")


def _stop(signum: int, _frame: FrameType | None) -> NoReturn:
    raise StopSignal(signum)


def bind(host: str, port: int) -> socket.socket:
    """Open a socket that listens on this address.

    Raises:
        UserError: the address is not available.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: {getattr(error, 'strerror', None) or error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)  # before the address is printed, so that its readers can connect
    except OSError as error:
        listener.close()
        hint = "; --port 0 takes any free one" if port else ""
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}{hint}") from None
    return listener


def exposure(host: str) -> str | None:
    """A one-line note about listening on an address that is not loopback; None: it is loopback."""
    if is_loopback(host):
        return None
    return f"note: on {host}, everyone who can reach this machine can use this server, without encryption"
