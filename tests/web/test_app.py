"""The safety of every server of the workbench: headers, host names, origins, keys, sizes, errors."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import ROOT
from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.testclient import TestClient

from utils.errors import UserError
from utils.web import guard
from utils.web.app import bind, create_app, exposure
from utils.web.errors import ApiError

LOCAL = "http://127.0.0.1:8000"


class Sum(BaseModel):
    a: int
    b: int = 0


def add_routes(app: FastAPI) -> FastAPI:
    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/sum")
    def add(body: Sum) -> int:
        return body.a + body.b

    @app.post("/v1/length")
    async def length(request: Request) -> int:
        return len(await request.body())

    @app.get("/fails/{how}")
    def fail(how: str) -> None:
        busy = ApiError(429, "busy", code="full")
        raise {"user": UserError("no such\nthing"), "api": busy, "bug": ValueError("x")}[how]

    return app


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(add_routes(create_app("a test")), LOCAL, raise_server_exceptions=False) as client:
        yield client


def error_of(response: Any) -> tuple[int, str]:
    body = response.json()["error"]
    assert body.keys() == {"message", "type", "param", "code"}
    return response.status_code, body["message"]


def test_every_response_has_the_security_headers_and_no_cors(client: TestClient) -> None:
    answers = (
        client.get("/health"),
        client.get("/none"),
        client.get("/fails/bug"),
        client.get("/health", headers={"host": "x"}),
    )
    assert [answer.status_code for answer in answers] == [200, 404, 500, 403]
    for answer in answers:
        policy = answer.headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"} <= set(policy)
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert not any(name.startswith("access-control") for name in answer.headers)


def test_the_description_is_served_without_pages_that_load_scripts_from_elsewhere(client: TestClient) -> None:
    description = client.get("/openapi.json").json()
    assert "4XX" in description["paths"]["/v1/sum"]["post"]["responses"]
    assert "422" not in description["paths"]["/v1/sum"]["post"]["responses"]
    assert [client.get(path).status_code for path in ("/docs", "/redoc")] == [404, 404]


def test_all_errors_have_the_same_form(client: TestClient) -> None:
    assert error_of(client.get("/fails/user")) == (400, "no such; thing")
    assert error_of(client.get("/fails/api")) == (429, "busy")
    assert error_of(client.get("/fails/bug")) == (500, "the server failed: ValueError")
    assert error_of(client.get("/none")) == (404, "Not Found")
    assert error_of(client.get("/v1/sum")) == (405, "Method Not Allowed")
    assert error_of(client.post("/v1/sum", json={"a": "x"}))[0] == 400
    assert client.post("/v1/sum", json={"a": "x"}).json()["error"]["param"] == "a"
    assert "not JSON" in error_of(client.post("/v1/sum", content=b"{", headers={"content-type": "application/json"}))[1]
    for content in (b"\xff\xfe", b'{"a": "\xff"}'):
        status, _ = error_of(client.post("/v1/sum", content=content, headers={"content-type": "application/json"}))
        assert status == 400
    assert client.post("/v1/sum", json={"a": 1, "b": 2}).json() == 3


@pytest.mark.parametrize("host", ["localhost", "localhost:99", "127.0.0.1", "127.1.2.3:1", "[::1]:8000"])
def test_a_loopback_server_accepts_the_names_of_the_loopback(client: TestClient, host: str) -> None:
    assert client.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "[::2]", "[", "10.0.0.1"]
)
def test_a_host_name_that_only_resolves_to_the_loopback_is_refused(client: TestClient, host: str) -> None:
    assert error_of(client.get("/health", headers={"host": host}))[0] == 403


def test_pages_of_other_origins_cannot_post(client: TestClient) -> None:
    def status(headers: dict[str, str]) -> int:
        return client.post("/v1/sum", json={"a": 1}, headers=headers).status_code

    assert status({}) == status({"origin": LOCAL, "sec-fetch-site": "same-origin"}) == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:8001", "http://["):
        assert status({"origin": origin}) == 403
    for site in ("cross-site", "same-site"):
        assert status({"sec-fetch-site": site}) == 403


def test_pages_of_other_origins_load_nothing_but_may_link(client: TestClient) -> None:
    def status(**fetch: str) -> int:
        return client.get("/health", headers={f"sec-fetch-{name}": value for name, value in fetch.items()}).status_code

    assert status(site="none", mode="navigate", dest="document") == status(site="same-origin", mode="cors") == 200
    for site in ("cross-site", "same-site"):
        assert status(site=site, mode="navigate", dest="document") == 200
        assert (
            status(site=site, mode="no-cors", dest="image") == status(site=site, mode="navigate", dest="iframe") == 403
        )
    assert client.get("/health", headers={"origin": "http://evil.example"}).status_code == 403


def test_a_public_server_accepts_any_name_and_requires_the_key() -> None:
    app = add_routes(create_app("a test", api_key="secret", loopback=False, open_paths=["/openapi.json"]))
    with TestClient(app, "http://models.example") as client:
        assert [client.get(path).status_code for path in ("/health", "/openapi.json", "/static/x")] == [200, 200, 404]
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer ü".encode()}):
            response = client.post("/v1/sum", json={"a": 1}, headers=headers)
            assert error_of(response)[0] == 401
            assert response.headers["www-authenticate"] == "Bearer"
        assert client.post("/v1/sum", json={"a": 1}, headers={"authorization": "Bearer secret"}).json() == 1


def test_a_body_has_a_limit_with_or_without_its_length(client: TestClient) -> None:
    def chunks(size: int) -> Iterator[bytes]:
        yield from [b"x" * 1000] * (size // 1000)

    most = guard.MOST_BODY
    assert client.post("/v1/length", content=b"x" * most).json() == most
    assert error_of(client.post("/v1/length", content=b"x" * (most + 1)))[0] == 413
    assert client.post("/v1/length", content=chunks(1_000_000)).json() == 1_000_000
    for path in ("/v1/length", "/v1/sum"):
        assert error_of(client.post(path, content=chunks(most + 1000)))[0] == 413
    assert error_of(client.post("/v1/length", headers={"content-length": "-1"}))[0] == 413


def test_a_draining_server_refuses_new_requests() -> None:
    app = add_routes(create_app("a test"))
    app.state.running.draining = True
    with TestClient(app, LOCAL) as client:
        response = client.post("/v1/sum", json={"a": 1})
        assert (error_of(response)[0], response.headers["retry-after"]) == (503, "5")
        assert client.get("/health").status_code == 200


def test_a_port_in_use_or_a_foreign_address_is_refused_in_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1:\d+: Address already in use; --port 0"):
            bind("127.0.0.1", taken.getsockname()[1])
    for host in ("203.0.113.7", "no such host", "x" * 70):
        with pytest.raises(UserError, match=host[:10]):
            bind(host, 0)


def test_an_address_that_others_can_reach_is_explained() -> None:
    assert exposure("127.0.0.1") is exposure("localhost") is exposure("::1") is None
    for host in ("0.0.0.0", "::", "10.1.2.3", "models.example"):
        assert host in (exposure(host) or "")


SERVER = """
import asyncio, signal, sys
from utils.terminal.cli import script
from utils.web.app import create_app, run_server

@script
def main(argv):
    app = create_app("a test")
    @app.get("/slow")
    async def slow() -> str:
        print("slow", flush=True)
        await asyncio.sleep(0.5)
        return "done"
    run_server(app, "127.0.0.1", 0)
if "background" in sys.argv:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as if a shell without a terminal started `serve.py &`
sys.exit(main([]))
"""


@pytest.mark.parametrize(
    ("signum", "words"), [(signal.SIGINT, []), (signal.SIGINT, ["background"]), (signal.SIGTERM, [])]
)
def test_a_signal_lets_running_requests_finish(signum: signal.Signals, words: list[str]) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SERVER, *words], cwd=ROOT, **pipes) as server:
        try:
            assert server.stdout is not None
            assert server.stderr is not None
            address = server.stdout.readline().split()[2]
            assert address.startswith("http://127.0.0.1:")
            port = int(address.rpartition(":")[2].strip("/"))
            with socket.create_connection(("127.0.0.1", port)) as connection, connection.makefile("rb") as answer:
                connection.sendall(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert server.stdout.readline() == "slow\n"
                server.send_signal(signum)
                assert answer.readline().startswith(b"HTTP/1.1 200")
            assert server.wait(timeout=20) == 128 + signum
            assert server.stderr.read() == "interrupted\n"
        finally:
            server.kill()
