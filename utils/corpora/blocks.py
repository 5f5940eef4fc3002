"""The bytes of a file, block by block, decompressed if its name ends in .gz or .zst."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from utils.corpora.sources import CorpusError
from utils.files import open_named
from utils.terminal.words import one_line

BLOCK = 1 << 20  # bytes of a file that are held at a time
ZSTD_BLOCK = 1 << 14  # compressed bytes read at a time: they may decompress to a thousand times as many
ZSTD_WINDOW = 1 << 31  # bytes: the window of zstd --long=31, the largest possible
COMPRESSED = (".gz", ".zst")


def named(path: Path | str) -> str:
    """A path as error messages show it: relative to the current folder if it is inside that folder."""
    folder = os.getcwd() + os.sep
    return one_line(str(path).removeprefix(folder))


def blocks(path: Path, start: int = 0, report: Callable[[int], None] = lambda count: None) -> Iterator[bytes]:
    """The content of a file from byte `start` on.

    Args:
        start: must be 0 for a compressed file.
        report: called with the number of bytes read from disk since the last call.

    Raises:
        CorpusError: the file cannot be read, or its compressed data is truncated or damaged.
    """
    kind = path.suffix.lower()
    done = start
    try:
        with open_named(path) as raw:
            if kind == ".gz":
                found = _gzip(raw)
            elif kind == ".zst":
                found = _zstd(path, raw)
            else:
                if start:  # a pipe cannot seek
                    raw.seek(start)
                found = iter(lambda: raw.read(BLOCK), b"")
            for block in found:
                yield block
                if kind in COMPRESSED:
                    report(raw.tell() - done)
                    done = raw.tell()
                else:
                    report(len(block))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(f"{named(path)}: truncated or damaged gzip data: {error}") from None
    except OSError as error:
        raise CorpusError(f"{named(path)}: cannot be read: {error.strerror or error}") from None


def _gzip(raw: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=raw) as file:
        while block := file.read(BLOCK):
            yield block


def _zstd(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise CorpusError(f"{named(path)}: .zst needs the package zstandard: pip install zstandard") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
    frame, data = None, b""
    try:
        while data or (data := raw.read(ZSTD_BLOCK)):
            frame = frame or decompressor.decompressobj()
            if block := frame.decompress(data):
                yield block
            data = frame.unused_data
            if frame.eof:
                frame = None
    except zstandard.ZstdError as error:
        raise CorpusError(f"{named(path)}: damaged zstd data: {error}") from None
    if frame is not None:
        raise CorpusError(f"{named(path)}: truncated zstd data")
