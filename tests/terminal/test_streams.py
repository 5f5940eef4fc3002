"""Streams that accept any text, and that discard what cannot be written."""

from __future__ import annotations

import io
import os
import sys
import threading
from pathlib import Path

import pytest

from utils.terminal.streams import lasting_output, text_output, why_lost


def file_stream(path: Path, encoding: str = "utf-8", errors: str = "strict") -> io.TextIOWrapper:
    return path.open("w", encoding=encoding, errors=errors)


@pytest.mark.parametrize("unbuffered", [False, True])
def test_printing_to_a_full_disk_raises_nothing_inside_lasting_output(
    monkeypatch: pytest.MonkeyPatch, unbuffered: bool
) -> None:
    fds = [os.open("/dev/full", os.O_WRONLY) for _ in range(2)]
    out, err = (
        io.TextIOWrapper(io.FileIO(fd, "w") if unbuffered else io.BufferedWriter(io.FileIO(fd, "w")), "ascii")  # type: ignore[arg-type]
        for fd in fds
    )
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with lasting_output():
        for _ in range(3):
            print("ü" * 100_000, flush=True)
            print("ü", file=sys.stderr)
        sys.excepthook(ValueError, ValueError("a traceback"), None)
        lost = why_lost(sys.stdout)
    assert lost is not None
    assert lost.strerror == "No space left on device"
    assert (sys.stdout, sys.stderr) == (out, err)
    out.flush()
    err.flush()  # nothing is left that could fail at exit


def test_a_stream_that_is_not_lasting_fails_and_remembers_why() -> None:
    with Path("/dev/full").open("w") as full:
        stream = text_output(full, lasting=False)
        with pytest.raises(OSError, match="No space left"):
            print("x" * 100_000, file=stream, flush=True)
        assert why_lost(stream) is not None
        raw = stream.buffer.raw  # type: ignore[attr-defined]
        raw.lasting = True  # closing it writes again


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("ascii", r"gr\xf6\xdfer # ~ * |\u20ac \udce9"), ("latin-1", r"größer # ~ * |\u20ac \udce9")],
)
def test_characters_that_cannot_be_encoded_become_lookalikes_or_escapes(
    encoding: str, expected: str, tmp_path: Path
) -> None:
    with file_stream(tmp_path / "out", encoding) as file:
        stream = text_output(file, lasting=False)
        stream.write("größer █ … ⠒ │€ \udce9")
        stream.flush()
    assert (tmp_path / "out").read_text(encoding=encoding) == expected


def test_characters_that_utf_8_can_encode_are_unchanged(tmp_path: Path) -> None:
    with file_stream(tmp_path / "out") as file:
        file.write("before ")
        stream = text_output(file, lasting=False)
        stream.write("größer █ … ⠒ │€ \udce9")
        stream.flush()
        file.write(" after")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "before größer █ … ⠒ │€ \\udce9 after"


def test_an_error_handler_chosen_by_the_user_is_kept(tmp_path: Path) -> None:
    with file_stream(tmp_path / "out", "ascii", "replace") as file:
        stream = text_output(file, lasting=False)
        stream.write("größer")
        stream.flush()
    assert (tmp_path / "out").read_text(encoding="ascii") == "gr??er"


def test_writing_waits_for_a_full_nonblocking_pipe() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    received = bytearray()

    def read() -> None:
        while data := os.read(reader, 4096):
            received.extend(data)

    thread = threading.Thread(target=read)
    with os.fdopen(writer, "w") as file:
        stream = text_output(file, lasting=True)
        thread.start()
        stream.write("x" * 1_000_000)
        stream.flush()
    thread.join()
    os.close(reader)
    assert bytes(received) == b"x" * 1_000_000


@pytest.mark.parametrize("closed", [True, False])
def test_output_to_a_closed_or_missing_stream_is_discarded(closed: bool, tmp_path: Path) -> None:
    file = file_stream(tmp_path / "out")
    file.close()
    print("ü", file=text_output(file if closed else None, lasting=True), flush=True)
    assert (tmp_path / "out").read_text() == ""


def test_a_stream_in_memory_is_kept() -> None:
    memory = io.StringIO()
    assert text_output(memory, lasting=True) is memory
