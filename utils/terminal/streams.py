"""stdout and stderr of a script: always open, able to show any text, and never a reason for training to fail."""

from __future__ import annotations

import codecs
import contextlib
import io
import logging
import os
import select
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, TextIO, cast

from utils.machine.process import keep_standard_descriptors

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

LOOKALIKE = "lookalike"  # the name under which `_lookalike` is registered as an error handler of codecs
LOOKALIKES = str.maketrans("█…·–━─┄│┃┤├┼┴┬┌┐└┘╭╮╰╯␣", "#~.----||" + 13 * "+" + "_")


class Output(io.FileIO):
    """The file behind a text stream, which remembers the first error of a write.

    Args:
        file: a descriptor, which stays open, or a path to append to.
        lasting: drop what cannot be written instead of raising OSError.

    lost: the first error of a write; None if there was none.
    original: the stream whose file this is, if any.
    """

    original: TextIO | None = None

    def __init__(self, file: int | Path, lasting: bool) -> None:
        opened = isinstance(file, int)
        super().__init__(file, "w" if opened else "a", closefd=not opened)
        self.lasting = lasting
        self.lost: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        """Write all of `data`, or drop the rest of it; returns its length."""
        left = memoryview(data).cast("B")
        while left:
            try:
                written: int | None = super().write(left)
            except OSError as error:  # a closed pipe, a full disk, a terminal that is gone
                self.lost = self.lost or error
                if not self.lasting:
                    raise
                break
            if written is None:  # another program made the pipe non-blocking, and it is full
                select.select([], [self], [])
            left = left[written or 0 :]
        return memoryview(data).nbytes


def text_output(stream: TextIO | None, lasting: bool) -> TextIO:
    """A stream that writes through an `Output` to the same file as `stream`; `stream` itself if it has no file.

    It can show any text, whatever its encoding. If `stream` is closed, it writes to the null device.
    """
    if stream is None or stream.closed:
        stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if not isinstance(stream, io.TextIOWrapper):  # in a notebook
        return stream
    errors = LOOKALIKE if stream.errors in ("strict", "surrogateescape") else stream.errors
    try:
        fd = stream.fileno()
    except OSError:  # in memory, in a test
        stream.reconfigure(errors=errors)
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    output = Output(fd, lasting)
    output.original = stream  # keep it alive: deleting it would close the file
    unbuffered = isinstance(stream.buffer, io.RawIOBase)  # by PYTHONUNBUFFERED or `python -u`
    return io.TextIOWrapper(
        cast(BinaryIO, output if unbuffered else io.BufferedWriter(output)),
        encoding=stream.encoding,
        errors=errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def prepare_streams() -> None:
    """Open the streams that are closed and protect stdout and stderr; for the start of a script.

    Any text can then be printed to both. A message on stderr that cannot be written is dropped.
    """
    keep_standard_descriptors()
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout, sys.stderr = text_output(sys.stdout, lasting=False), text_output(sys.stderr, lasting=True)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Inside the block, drop what cannot be written to stdout and stderr, so that no `print` fails."""
    keep_standard_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = lasting = text_output(sys.stdout, lasting=True), text_output(sys.stderr, lasting=True)
    try:
        yield
    finally:
        for stream in lasting:
            stream.flush()
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Silence other packages inside the block: neither `warnings` nor log messages are shown."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def why_lost(stream: IO[str]) -> OSError | None:
    """The error because of which a stream on an `Output` lost some of what was printed; None if it lost nothing."""
    buffer = getattr(stream, "buffer", None)
    output = getattr(buffer, "raw", buffer)
    return output.lost if isinstance(output, Output) else None


def drop(stream: TextIO) -> None:
    """Redirect a stream to the null device, so that the flush at exit does not fail too."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def is_unicode(stream: TextIO | None) -> bool:
    """Whether a stream can encode any character."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, whose streams claim to be a terminal but are not."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def _lookalike(error: UnicodeError) -> tuple[str, int]:
    """Replace each drawing character by one ASCII character, and any other by an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_ascii, error.object[error.start : error.end])), error.end


def _ascii(char: str) -> str:
    if "\u2800" <= char <= "\u28ff":  # Braille patterns, from plots
        return " " if char == "\u2800" else "*"
    return ascii(char.translate(LOOKALIKES))[1:-1]


codecs.register_error(LOOKALIKE, _lookalike)
