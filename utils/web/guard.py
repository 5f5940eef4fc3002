"""Checks of each request before it reaches the app, and the security headers of each response."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from utils.web.errors import ApiError, error_response

MOST_BODY = 4 << 20  # bytes in the body of a request
BODY_SECONDS = 30.0  # that a client has to send the body
TOO_LARGE = f"the body of a request may have at most {MOST_BODY:,} bytes"
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
OPEN_PATHS, STATIC = ("/", "/health"), "/static/"  # these paths and this folder need no API key
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", CONTENT_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class Running:
    """The requests that an app is working on.

    draining: whether the server is about to end; only /health, which reports that, still answers.
    """

    def __init__(self) -> None:
        self.count = 0
        self.draining = False


class Guard:
    """ASGI middleware: refuses requests that the app must not see, limits their bodies, and adds HEADERS to responses.

    Args:
        api_key: required as a bearer token, except for OPEN_PATHS, `open_paths` and static files; None: no key.
        loopback: whether the server listens on a loopback address only. A request with any other host name then comes
            from a page whose name was made to point here (DNS rebinding), and is refused.
        open_paths: further paths that need no key, because they hold nothing secret.
    """

    def __init__(
        self, app: ASGIApp, running: Running, api_key: str | None, loopback: bool, open_paths: Collection[str] = ()
    ) -> None:
        self._app, self._running, self._key, self._loopback = app, running, api_key, loopback
        self._open = {*OPEN_PATHS, *open_paths}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        is_answered = False

        async def send_with_headers(message: Message) -> None:
            nonlocal is_answered
            if message["type"] == "http.response.start":
                is_answered = True
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if refusal := self._refusal(scope, headers):
            await error_response(refusal)(scope, receive, send_with_headers)
            return
        self._running.count += 1
        try:
            await self._app(scope, _bounded(receive), send_with_headers)
        except Exception as error:  # a bug in a route; raised again for the traceback on stderr
            if not is_answered:
                failure = ApiError(500, f"the server failed: {type(error).__name__}")
                await error_response(failure)(scope, receive, send_with_headers)
            raise
        finally:
            self._running.count -= 1

    def _refusal(self, scope: Scope, headers: Mapping[str, str]) -> ApiError | None:
        """The error for a request that the app must not see; None: it may."""
        if self._loopback and not is_loopback(host_name(headers.get("host", ""))):
            return ApiError(403, "this server answers only to localhost: its Host header must be a loopback name")
        if not _is_same_origin(headers) and not (scope["method"] in SAFE_METHODS and _opens_a_page(headers)):
            return ApiError(403, "refused: the request comes from a page of another origin")
        if self._running.draining and scope["path"] != "/health":
            return ApiError(503, "the server is shutting down", headers={"Retry-After": "5", "Connection": "close"})
        if self._key is not None and not self._is_open(scope["path"]):
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self._key.encode()):
                message = "no valid API key: expected the header Authorization: Bearer KEY"
                return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > MOST_BODY:
            return ApiError(413, TOO_LARGE)
        return None

    def _is_open(self, path: str) -> bool:
        return path in self._open or path.startswith(STATIC)


def _bounded(receive: Receive) -> Receive:
    """Wrap `receive` so that the body has at most MOST_BODY bytes and arrives within BODY_SECONDS."""
    size, is_whole, end = 0, False, time.monotonic() + BODY_SECONDS

    async def bounded() -> Message:
        nonlocal size, is_whole
        if is_whole:  # the next message is the end of the connection, which may come at any time
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), max(end - time.monotonic(), 0.01))
        except TimeoutError:
            raise HTTPException(408, f"the body of a request must arrive within {BODY_SECONDS:g} seconds") from None
        size += len(message.get("body", b""))
        is_whole = not message.get("more_body", False)
        if size > MOST_BODY:
            raise HTTPException(413, TOO_LARGE)
        return message

    return bounded


def host_name(host: str) -> str:
    """The name in a Host header, without its port and the brackets of IPv6; empty if it is not valid."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether this name or address always means this machine."""
    if host in ("localhost", "localhost."):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_same_origin(headers: Mapping[str, str]) -> bool:
    """Whether a request comes from a page of this server, or from a program, which sends neither header."""
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    return origin is None or _netloc(origin) == headers.get("host", "").lower()


def _opens_a_page(headers: Mapping[str, str]) -> bool:
    """Whether a browser sends a request because somebody follows a link, rather than because a page loads something."""
    return headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"


def _netloc(origin: str) -> str:
    """HOST:PORT of an origin; empty if it has none ("null") or is not valid."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
