"""--notify: the message when a run ends, servers that fail, and an address that stays secret."""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import train
from utils.training import notify
from utils.training.notify import VARIABLE, Notifier, message, take_url, without_url
from utils.training.result import TrainResult

SECRET = "-".join(("T0KEN", "of", "a", "webhook"))  # an uncommitted edit of this file would put it into code.patch


class Hook(ThreadingHTTPServer):
    """A webhook that records what it receives. It answers with the status `answer`, or never if that is None."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: int | None = 200
        self.received: list[tuple[str, Any, str | None]] = []  # path, message, Authorization
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://me:{SECRET}@127.0.0.1:{self.server_port}/services/{SECRET}?key={SECRET}"


class Handler(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.received.append((self.path, body, self.headers["Authorization"]))
        if self.server.answer is None:
            self.server.over.wait(30)
            return
        self.send_response(self.server.answer)
        self.send_header("Location", f"/elsewhere/{SECRET}")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[Hook]:
    with Hook() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.over.set()
        server.shutdown()


def result(**changes: Any) -> TrainResult:
    facts = {"run_dir": Path("runs/a_run"), "status": "completed", "exit_reason": None, "steps": 2000, "seconds": 1.5}
    facts |= {"train_loss": 1.0, "val_loss": 1.25, "losses_step": 2000, "best_val_loss": 1.25, "best_step": 2000}
    return TrainResult(**facts | {"parameters": 10} | changes)


def test_a_run_sends_its_status_at_its_end_and_records_no_secret(
    hook: Hook, tiny_argv: Callable[..., list[str]], only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tiny_argv("--run-tag", "hooked", "--notify", hook.url)
    monkeypatch.setattr("sys.argv", ["train.py", *words])  # trackers record the command line
    monkeypatch.setenv(VARIABLE, f"https://elsewhere.example/{SECRET}")  # the flag wins; subprocesses inherit neither
    assert train.main(words) == 0
    ((path, sent, authorization),) = hook.received
    assert path == f"/services/{SECRET}?key={SECRET}"
    assert authorization is not None
    assert authorization.startswith("Basic ")
    assert (sent["run"], sent["status"], sent["steps"]) == (only_run().name, "completed", 6)
    assert sent["val_loss"] == json.loads((only_run() / "run.json").read_text())["summary"]["val/loss"]
    for file in only_run().rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file
    assert SECRET not in " ".join(sys.argv)
    assert VARIABLE not in os.environ


@pytest.mark.parametrize(
    ("user", "pair"), [("ada:l%40ve", "ada:l@ve"), ("tok", "tok:"), ("a%3Ab:c:d", "a:b:c:d"), (":key", ":key")]
)
def test_user_and_password_are_sent_as_curl_sends_them(user: str, pair: str) -> None:
    notifier = Notifier(urlsplit(f"https://{user}@example.org/x"), "--notify")
    assert b64decode(notifier._headers["Authorization"].removeprefix("Basic ")).decode() == pair


@pytest.mark.parametrize(("flags", "status"), [(["--stop-at-step", "2"], "interrupted"), (["--callbacks", "x"], None)])
def test_an_interruption_is_sent_but_a_mistake_in_the_flags_is_not(
    flags: list[str],
    status: str | None,
    hook: Hook,
    tiny_argv: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, hook.url)
    train.main(tiny_argv(*flags))
    assert [sent["status"] for _, sent, _ in hook.received] == ([] if status is None else [status])


def test_a_failure_is_sent_after_the_run_is_released(
    hook: Hook, tiny_argv: Callable[..., list[str]], only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(session: Any) -> None:
        raise RuntimeError("the machine is on fire")

    monkeypatch.setattr(train, "train_session", fail)
    monkeypatch.setenv(VARIABLE, hook.url)
    with pytest.raises(RuntimeError, match="on fire"):
        train.main(tiny_argv())
    ((_, sent, _),) = hook.received
    assert (sent["status"], sent["exit_reason"]) == ("failed", "RuntimeError: the machine is on fire")
    assert "failed (RuntimeError: the machine is on fire) after 0 steps" in sent["text"]


@pytest.mark.parametrize(
    ("answer", "warning"),
    [(500, "it answered 500"), (302, "it answered 302"), (None, "no answer within"), ("closed", "Connection re")],
)
def test_a_failed_notification_is_one_warning_without_the_address(
    answer: Any, warning: str, hook: Hook, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notifier = take_url(hook.url)
    assert notifier is not None
    hook.answer = answer
    if answer is None:
        monkeypatch.setattr(notify, "PATIENCE_SECONDS", 0.2)
    if answer == "closed":
        hook.server_close()
    notifier.send(result())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"warning: --notify: 127.0.0.1 was not notified: {warning}")
    assert captured.err.count("\n") == 1
    assert SECRET not in captured.err


@pytest.mark.parametrize(
    "url", ["", "ftp://host/T0KEN", "https:///T0KEN", "host/T0KEN", "http://[T0KEN", "http://h:T/a b"]
)
def test_an_invalid_address_is_refused_without_quoting_it(
    url: str, tiny_argv: Callable[..., list[str]], runs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(tiny_argv(f"--notify={url}")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --notify: expected ")
    assert "T0KEN" not in error
    assert not runs_dir.exists()


def test_a_command_line_is_recorded_without_the_address() -> None:
    words = ["--seed", "1", "--notify", "http://x", "--notify=http://y", "--json"]
    assert without_url(words) == ["--seed", "1", "--json"]


def test_a_diverged_run_has_losses_that_json_can_hold() -> None:
    sent = message(result(status="diverged", val_loss=float("nan"), exit_reason="loss is nan"))
    assert json.loads(json.dumps(sent, allow_nan=False))["val_loss"] == "nan"
    assert sent["text"] == "a_run: diverged (loss is nan) after 2,000 steps, best val/loss 1.2500"


@pytest.mark.parametrize("script", ["experiments", "sweep"])
def test_commands_that_train_many_runs_do_not_pass_the_address_on(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "http://localhost/")
    assert importlib.import_module(script).main(["--no-such-flag"]) == 2
    assert VARIABLE not in os.environ
