"""A local server that stands in for the Hugging Face hub: models in folders, and failures on request.

python tests/formats/fake_hub.py FOLDER NAME ... --port PORT     # serves the model in FOLDER under these names
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The models of the server, its failures, and the requests that it has received.

    models: the folder of each model, by name.
    gated: names of models that need a token.
    breaks: the number of bytes after which the connection breaks, once, by file name.
    stalls: like `breaks`, but the connection stays open and nothing more is sent until `go` is set.
    sent: the number of bytes sent in total, by file name.
    wrong: names of files for which the server states a wrong hash.
    """

    def __init__(self) -> None:
        self.models: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.breaks: dict[str, int] = {}
        self.stalls: dict[str, int] = {}
        self.go = threading.Event()
        self.sent: Counter[str] = Counter()
        self.wrong: set[str] = set()
        self.asked: list[tuple[str, str | None]] = []  # path and range
        self.url = ""

    def digest(self, path: Path) -> tuple[str, bool]:
        """The hash that the hub states for a file, and whether the file counts as large."""
        content = path.read_bytes()
        if path.name in self.wrong:
            content += b"!"
        large = path.suffix == ".safetensors"
        if large:
            return hashlib.sha256(content).hexdigest(), True
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), False


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection from `hub`."""

    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)  # this answers the requests

    def log_message(self, *arguments: Any) -> None: ...

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append((path, self.headers.get("Range")))
        found = re.fullmatch(r"/api/models/((?:[\w.-]+/)?[\w.-]+?)(/revision/([^/]+))?(/tree/([^/]+))?", path)
        if found:
            return self.facts(found[1], found[3] or found[5] or "main", bool(found[4]))
        found = re.fullmatch(r"/((?:[\w.-]+/)?[\w.-]+)/resolve/([^/]+)/([\w.-]+)", path)
        if found and found[1] in self.hub.models:
            return self.file(found[1], self.hub.models[found[1]] / found[3])
        return self.answer(404, X_Error_Code="EntryNotFound")

    def facts(self, name: str, revision: str, tree: bool) -> None:
        if name not in self.hub.models:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if name in self.hub.gated and "Authorization" not in self.headers:
            return self.answer(401, X_Error_Code="GatedRepo")
        if revision not in ("main", COMMIT):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        files = []
        for path in sorted(self.hub.models[name].iterdir()):
            digest, large = self.hub.digest(path)
            entry: dict[str, Any] = {"path": path.name, "type": "file", "oid": digest}
            entry |= {"size": path.stat().st_size}
            if large:
                entry["lfs"] = {"oid": digest, "size": path.stat().st_size, "pointerSize": 100}
            files.append(entry)
        siblings = [
            {"rfilename": entry["path"]} | ({"lfs": {**entry["lfs"], "sha256": entry["oid"]}} if "lfs" in entry else {})
            for entry in files
        ]
        value = files if tree else {"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        return self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def file(self, name: str, path: Path) -> None:
        if not path.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound")
        if name in self.hub.gated and "Authorization" not in self.headers:
            return self.answer(401, X_Error_Code="GatedRepo")
        content, (digest, large) = path.read_bytes(), self.hub.digest(path)
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        first = int((re.match(r"bytes=(\d+)-", self.headers.get("Range") or "") or ["", "0"])[1])
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        if self.command == "HEAD":
            return None
        end = self.hub.breaks.pop(path.name, self.hub.stalls.get(path.name, len(content)))
        self.hub.sent[path.name] += end - first
        self.wfile.write(content[first:end])
        self.wfile.flush()
        if self.hub.stalls.pop(path.name, None) is not None:
            self.hub.go.wait(60)
        if end < len(content):
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        return None


@contextmanager
def serve_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.go.set()
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    folder, *names, _, port = sys.argv[1:]
    hub = Hub()
    hub.models = dict.fromkeys(names, Path(folder))
    ThreadingHTTPServer(("127.0.0.1", int(port)), partial(Handler, hub)).serve_forever()
