"""The append-only logs of a run: the source from which everything else (TensorBoard, Aim, reports) is made.

One JSON object on each line. A line counts once its newline is written: a reader ignores a torn last line, and
`truncate` cuts it off.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from utils.errors import UserError
from utils.runs.layout import HISTOGRAMS_LOG, METRICS_LOG, SAMPLES_LOG
from utils.runs.metrics import decode_number

METRICS_FILE, HISTOGRAMS_FILE, SAMPLES_FILE = METRICS_LOG.name, HISTOGRAMS_LOG.name, SAMPLES_LOG.name
LOG_FILES = (METRICS_FILE, HISTOGRAMS_FILE, SAMPLES_FILE)  # checkpoints and trackers keep an offset for each name
SCANNED_BYTES = 65_536


class RunLogError(UserError):
    """Logs that do not belong to the checkpoint."""


class LogWriter:
    """Appends records to one log file. Each batch of records is one write; `sync` makes it survive a power loss."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append one line for each record. Numbers that are not finite must be encoded before (encode_number).

        Raises:
            TypeError: a value cannot be written as JSON; nothing is written.
            OSError: the disk is full or gone; the file is unchanged.
        """
        data = memoryview(b"".join([orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in records]))
        start = self.offset
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            os.ftruncate(self._fd, start)  # a torn line would spoil the next one
            raise

    @property
    def offset(self) -> int:
        """Size of the file in bytes."""
        return os.fstat(self._fd).st_size

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class RunLog:
    """The three logs of a run: metrics, histograms, sample texts.

    Args:
        logs_dir: the folder logs/ of a run directory.
    """

    def __init__(self, logs_dir: Path) -> None:
        self.metrics = LogWriter(logs_dir / METRICS_FILE)
        self.histograms = LogWriter(logs_dir / HISTOGRAMS_FILE)
        self.samples = LogWriter(logs_dir / SAMPLES_FILE)

    def offsets(self) -> dict[str, int]:
        """Size of each log in bytes, by file name."""
        return {writer.path.name: writer.offset for writer in (self.metrics, self.histograms, self.samples)}

    def sync(self) -> None:
        for writer in (self.metrics, self.histograms, self.samples):
            writer.sync()

    def close(self) -> None:
        """Sync and close; nothing can be written afterwards."""
        self.sync()
        for writer in (self.metrics, self.histograms, self.samples):
            writer.close()


def read_from(path: Path, offset: int = 0, max_bytes: int = 1 << 20) -> tuple[list[dict[str, Any]], int]:
    """The complete records of `path` from byte `offset` on, up to about `max_bytes` bytes.

    Returns:
        The records, and the offset after the last of them; a torn last line is left for the next call.

    Raises:
        FileNotFoundError: the log does not exist.
        ValueError: a complete line is not JSON.
    """
    lines = read_lines(path, offset, max_bytes)
    return [orjson.loads(line) for line in lines], offset + sum(map(len, lines))


def read_lines(path: Path, offset: int = 0, max_bytes: int = 1 << 20) -> list[bytes]:
    """The complete lines of `path` from byte `offset` on, up to about `max_bytes` bytes, with their line ends.

    Raises:
        FileNotFoundError: the log does not exist.
    """
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(max_bytes)
        if b"\n" not in data and len(data) == max_bytes:  # one line longer than a chunk
            data += file.readline()
    return [line + b"\n" for line in data.split(b"\n")[:-1]]


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """All complete records of a log; none if the file does not exist."""
    offset = 0
    while path.exists():
        records, end = read_from(path, offset)
        if end == offset:
            return
        yield from records
        offset = end


def last_record(path: Path) -> dict[str, Any] | None:
    """The last complete record of a log; None if there is none."""
    if not path.exists():
        return None
    size, length = path.stat().st_size, SCANNED_BYTES
    with path.open("rb") as file:
        while True:
            file.seek(max(0, size - length))
            lines = file.read(min(length, size)).split(b"\n")[:-1]
            if len(lines) > 1 or length >= size:  # the first may be only a part of a line
                return orjson.loads(lines[-1]) if lines else None
            length *= 4


def read_metrics(logs_dir: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of each record that has the metric `name`, in the order of the log."""
    return [
        (record["step"], decode_number(record[name]))
        for record in read_records(logs_dir / METRICS_FILE)
        if name in record
    ]


def offset_of_step(path: Path, step: int) -> int:
    """The byte where the first record of `step` or a later step begins; the end of the complete lines if none does.

    Steps never decrease in a log, so the place is found by bisection down to a part that is read in full.
    """
    if not path.exists():
        return 0
    with path.open("rb") as file:
        low, high = 0, path.stat().st_size  # a line of an earlier step begins at low, unless it is 0
        while high - low > SCANNED_BYTES:
            middle = (low + high) // 2
            file.seek(middle)
            file.readline()  # the rest of a line
            start, line = file.tell(), file.readline()
            if line.endswith(b"\n") and orjson.loads(line)["step"] < step:
                low = start
            else:
                high = middle
        file.seek(low)
        for line in file:
            if not line.endswith(b"\n") or orjson.loads(line)["step"] >= step:
                break
            low += len(line)
    return low


def truncate(path: Path, offset: int | None = None) -> None:
    """Cut a log back to its first `offset` bytes, or without an offset to its last complete line.

    Raises:
        ValueError: the log is shorter than `offset`.
    """
    if not path.exists():
        return
    if offset is not None and offset > path.stat().st_size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, fewer than the {offset} to keep")
    with path.open("r+b") as file:
        if offset is None:
            data = file.read()
            offset = data.rfind(b"\n") + 1
        file.truncate(offset)
        file.flush()
        os.fsync(file.fileno())


def cut_logs(logs_dir: Path, offsets: Mapping[str, int]) -> None:
    """Cut all logs of a run back to the sizes that they had when a checkpoint was saved.

    Args:
        offsets: size of each log by file name; a log that is not named becomes empty.

    Raises:
        RunLogError: a log is shorter than that; nothing is cut.
    """
    for name in LOG_FILES:
        path, offset = logs_dir / name, offsets.get(name, 0)
        size = path.stat().st_size if path.exists() else 0
        if size < offset:
            raise RunLogError(f"{path}: has {size:,} bytes, but had {offset:,} when the checkpoint was saved")
    for name in LOG_FILES:
        truncate(logs_dir / name, offsets.get(name, 0))
