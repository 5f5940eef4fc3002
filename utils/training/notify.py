"""train.py --notify URL: send a JSON message to a URL when a run has ended. A failure of this never harms the run.

The address of a webhook is a secret: it is not a setting, no record of the run has it, and no warning quotes it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from utils.errors import UserError
from utils.terminal.commands import as_plain
from utils.terminal.words import one_line

if TYPE_CHECKING:
    from utils.terminal.cli import Parser
    from utils.training.result import TrainResult

FLAG, VARIABLE = "--notify", "WORKBENCH_NOTIFY_URL"
TIMEOUT_SECONDS = 5.0  # for one network operation
PATIENCE_SECONDS = 8.0  # for all of them; after that the message is given up


def add_notify_flag(parser: Parser) -> None:
    """Add --notify."""
    group = parser.add_argument_group("when a run ends")
    group.add_argument(
        FLAG,
        metavar="URL",
        help=f"POST status and losses as JSON to this http or https URL; the environment variable {VARIABLE} does the "
        "same, hidden from other users of the machine. Neither is recorded",
    )


def take_url(given: str | None) -> Notifier | None:
    """The Notifier for the URL in --notify or else in the environment variable; None if neither is given.

    The URL is removed from the environment and from sys.argv, so that child processes and trackers, which record both,
    do not see it.

    Raises:
        UserError: it is not an http or https URL.
    """
    from_environment = os.environ.pop(VARIABLE, None)
    sys.argv[1:] = without_url(sys.argv[1:])
    url, name = (given, FLAG) if given is not None else (from_environment, VARIABLE)
    if not url:
        if given is not None:
            raise UserError(f"{FLAG}: expected an http or https URL, got nothing")
        return None
    try:
        parts = urlsplit(url.strip())
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        valid = valid and url.strip().isascii() and url.strip().isprintable() and " " not in url.strip()
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"{name}: expected a URL like https://example.org/hook (what was given is not shown)")
    return Notifier(parts, name)


def without_url(argv: Sequence[str]) -> list[str]:
    """A command line without --notify and its value."""
    kept: list[str] = []
    for place, word in enumerate(argv):
        follows = place > 0 and argv[place - 1] == FLAG
        if not follows and word != FLAG and not word.startswith(f"{FLAG}="):
            kept.append(word)
    return kept


class Notifier:
    """Sends the message.

    Args:
        parts: the URL; user and password become a header.
        name: the flag or variable that the URL came from, for warnings.
    """

    def __init__(self, parts: SplitResult, name: str) -> None:
        self._name = name
        self._host = one_line(parts.hostname or "")
        self._headers = {"Content-Type": "application/json", "User-Agent": "lm-workbench"}
        user, at, _ = parts.netloc.rpartition("@")
        if at:
            name, _, password = user.partition(":")
            credentials = base64.b64encode(f"{unquote(name)}:{unquote(password)}".encode()).decode()
            self._headers["Authorization"] = f"Basic {credentials}"
        self._parts = parts
        self._path = urlunsplit(("", "", parts.path or "/", parts.query, ""))

    def send(self, result: TrainResult | None) -> None:
        """Send how a run ended and wait for at most PATIENCE_SECONDS; a failure is only a warning.

        Args:
            result: None if the run has no result because its record could not be written; then nothing is sent.
        """
        if result is None:
            return
        problem = [f"no answer within {PATIENCE_SECONDS:g} s"]
        body = json.dumps(message(result)).encode()
        thread = threading.Thread(target=lambda: problem.__setitem__(0, self._post(body)), daemon=True)
        with contextlib.suppress(KeyboardInterrupt):  # a signal ends the waiting, not the run
            thread.start()
            thread.join(PATIENCE_SECONDS)
        if problem[0]:
            print(f"warning: {self._name}: {self._host} was not notified: {problem[0]}", file=sys.stderr)

    def _post(self, body: bytes) -> str:
        """Send the message; return why it could not be sent, or an empty text if it was."""
        import http.client  # takes a tenth of the time of --help
        import ssl

        parts = self._parts
        connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        try:
            connection = connect(parts.hostname or "", parts.port, timeout=TIMEOUT_SECONDS)
            with contextlib.closing(connection):
                connection.request("POST", self._path, body, self._headers)
                status = connection.getresponse().status
        except ssl.SSLError as error:
            return f"its certificate or encryption is not accepted ({error.reason or type(error).__name__})"
        except OSError as error:
            return one_line(error.strerror or type(error).__name__)
        except Exception as error:  # a network error must not fail a run; its text may quote the address
            return type(error).__name__
        return "" if 200 <= status < 300 else f"it answered {status}"


def message(result: TrainResult) -> dict[str, Any]:
    """The message to send. Non-finite losses are strings; `text` is the part that Slack and similar services show."""
    best = "" if result.best_val_loss is None else f", best val/loss {result.best_val_loss:.4f}"
    reason = f" ({result.exit_reason})" if result.exit_reason else ""
    text = f"{result.run_dir.name}: {result.status}{reason} after {result.steps:,} steps{best}"
    keys = ("status", "exit_reason", "steps", "train_loss", "val_loss", "best_val_loss", "best_step", "seconds")
    facts: dict[str, Any] = as_plain({key: result[key] for key in (*keys, "val_bits_per_byte", "parameters")})
    return {"text": text, "run": result.run_dir.name, **facts}
