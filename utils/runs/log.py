"""The append-only logs of a run, the source of everything else (TensorBoard, Aim, reports).

Each line is one JSON object. A line counts once its newline is written: readers ignore an incomplete last line, and
`truncate` removes it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from utils.errors import UserError
from utils.files import open_regular, regular_fd
from utils.runs.layout import HISTOGRAMS_LOG, METRICS_LOG, SAMPLES_LOG
from utils.runs.metrics import decode_number

METRICS_FILE, HISTOGRAMS_FILE, SAMPLES_FILE = METRICS_LOG.name, HISTOGRAMS_LOG.name, SAMPLES_LOG.name
LOG_FILES = (METRICS_FILE, HISTOGRAMS_FILE, SAMPLES_FILE)  # checkpoints and trackers keep an offset for each name
SCANNED_BYTES = 65_536
MAX_LINE_BYTES = 16 << 20  # records have some hundred bytes, histograms some thousand


class RunLogError(UserError):
    """The logs are damaged, or do not match the checkpoint."""


def _run_of(log: Path) -> Path:
    """The run directory of a log, which links must not lead out of."""
    return log.parent.parent


class LogWriter:
    """Appends records to one log file, each batch with one write; `sync` makes them survive a power loss."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = regular_fd(path, _run_of(path), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append one line for each record. Non-finite numbers must already be encoded (`encode_number`).

        Raises:
            TypeError: a value cannot be encoded as JSON; nothing is written.
            OSError: the disk is full or gone, or the run directory was moved or deleted; the file is unchanged.
        """
        data = memoryview(b"".join([orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in records]))
        start = self.offset
        self.check_place()
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            os.ftruncate(self._fd, start)  # an incomplete line would spoil the next one
            error.filename = os.fspath(self.path)  # so that the message names the disk
            raise

    def check_place(self) -> None:
        """Raise OSError if the run directory was moved or deleted, since what is written would be lost or misplaced."""
        if os.fstat(self._fd).st_nlink == 0 or not self.path.exists():
            raise OSError(errno.ESTALE, "was deleted or moved while it was trained", str(_run_of(self.path)))

    @property
    def offset(self) -> int:
        """Size of the file in bytes."""
        return os.fstat(self._fd).st_size

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class RunLog:
    """Writers for the three logs of a run: metrics, histograms and sample texts.

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
        """Sync and close the logs; nothing can be written afterwards."""
        self.sync()
        for writer in (self.metrics, self.histograms, self.samples):
            writer.close()


def read_from(path: Path, offset: int = 0, max_bytes: int = 1 << 20) -> tuple[list[dict[str, Any]], int]:
    """Read the complete records of `path` from byte `offset` on, up to about `max_bytes` bytes.

    Returns:
        The records, and the offset after the last of them; an incomplete last line is left for the next call.

    Raises:
        FileNotFoundError: the log does not exist.
        RunLogError: a complete line is not a record.
    """
    lines = read_lines(path, offset, max_bytes)
    records: list[dict[str, Any]] = []
    for line in lines:
        try:
            records.append(_record(path, line))
        except RunLogError:
            number = _lines_before(path, offset) + len(records) + 1
            raise RunLogError(f"{path}:{number}: the log is damaged: this line is not a record") from None
    return records, offset + sum(map(len, lines))


def record_at(path: Path, offset: int, line: bytes) -> dict[str, Any]:
    """Parse the line of a log that begins at byte `offset`, a record with a step and a time.

    Raises:
        RunLogError: the line is something else; the message has its number.
    """
    try:
        record = _record(path, line)
        if isinstance(record["step"], int) and isinstance(record["time"], int | float):
            return record
    except (RunLogError, KeyError):
        pass
    number = _lines_before(path, offset) + 1
    raise RunLogError(f"{path}:{number}: the log is damaged: this line is not a record")


def _record(path: Path, line: bytes) -> dict[str, Any]:
    """Parse one line of the log `path`.

    Raises:
        RunLogError: the line is not a record.
    """
    try:
        record = orjson.loads(line)
        if not isinstance(record, dict) or not isinstance(record.get("step", 0), int):
            raise ValueError
    except ValueError:
        raise RunLogError(f"{path}: the log is damaged: its last line is not a record") from None
    return record


def _lines_before(path: Path, offset: int) -> int:
    """The number of lines in the first `offset` bytes of a file."""
    count = 0
    with open_regular(path, _run_of(path)) as file:
        while offset > 0 and (data := file.read(min(offset, 1 << 20))):
            count, offset = count + data.count(b"\n"), offset - len(data)
    return count


def read_lines(path: Path, offset: int = 0, max_bytes: int = 1 << 20) -> list[bytes]:
    """Read the complete lines of `path` from byte `offset` on, up to about `max_bytes` bytes, with their newlines.

    Raises:
        FileNotFoundError: the log does not exist.
        OSError: it is not a regular file.
        RunLogError: a line is longer than any record.
    """
    with open_regular(path, _run_of(path)) as file:
        file.seek(offset)
        data = file.read(max_bytes)
        if b"\n" not in data and len(data) == max_bytes:  # one line is longer than a chunk
            data += file.readline(MAX_LINE_BYTES)
            if len(data) >= max_bytes + MAX_LINE_BYTES:
                raise RunLogError(f"{path}: the log is damaged: a line of more than {MAX_LINE_BYTES >> 20} MiB")
    return [line + b"\n" for line in data.split(b"\n")[:-1]]


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield all complete records of a log; none if the file does not exist."""
    offset = 0
    while path.exists():
        records, end = read_from(path, offset)
        if end == offset:
            return
        yield from records
        offset = end


def last_record(path: Path) -> dict[str, Any] | None:
    """The last complete record of a log; None if it has none or does not exist.

    Raises:
        OSError: the log cannot be read.
        RunLogError: the last line is not a record.
    """
    if not path.exists():
        return None
    size, length = path.stat().st_size, SCANNED_BYTES
    with open_regular(path, _run_of(path)) as file:
        while True:
            file.seek(max(0, size - length))
            lines = file.read(min(length, size)).split(b"\n")[:-1]
            if len(lines) > 1 or length >= size:  # the first one may be only a part of a line
                return _record(path, lines[-1]) if lines else None
            if length > MAX_LINE_BYTES:
                raise RunLogError(f"{path}: the log is damaged: a line of more than {MAX_LINE_BYTES >> 20} MiB")
            length *= 4


def read_metrics(logs_dir: Path, name: str) -> list[tuple[int, float]]:
    """List (step, value) for each record that has the metric `name`, in the order of the log."""
    return [
        (record["step"], decode_number(record[name]))
        for record in read_records(logs_dir / METRICS_FILE)
        if name in record
    ]


def offset_of_step(path: Path, step: int) -> int:
    """The byte offset of the first record of `step` or a later step; the end of the complete lines if there is none.

    Steps never decrease in a log, so bisection narrows the place down to a part that is read in full.
    """
    if not path.exists():
        return 0
    with open_regular(path, _run_of(path)) as file:
        low, high = 0, path.stat().st_size  # unless low is 0, a line of an earlier step begins there
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
    """Cut a log back to its first `offset` bytes or, without an offset, to the end of its last complete line.

    Raises:
        ValueError: the log is shorter than `offset`.
    """
    if not path.exists():
        return
    if offset is not None and offset > path.stat().st_size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, fewer than the {offset} to keep")
    fd = regular_fd(path, _run_of(path), os.O_RDWR)
    try:
        os.ftruncate(fd, _end_of_lines(fd) if offset is None else offset)
        os.fsync(fd)
    finally:
        os.close(fd)


def _end_of_lines(fd: int) -> int:
    """The offset after the last newline of a file."""
    end = os.fstat(fd).st_size
    while end > 0:
        start = max(0, end - SCANNED_BYTES)
        if (found := os.pread(fd, end - start, start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


def cut_logs(logs_dir: Path, offsets: Mapping[str, int]) -> None:
    """Cut all logs of a run back to the sizes that they had when a checkpoint was saved.

    Args:
        offsets: size of each log in bytes, by file name; a log without an entry is emptied.

    Raises:
        RunLogError: a log is shorter than its offset, and none was cut; or a log cannot be cut.
    """
    for name in LOG_FILES:
        path, offset = logs_dir / name, offsets.get(name, 0)
        size = path.stat().st_size if path.exists() else 0
        if size < offset:
            raise RunLogError(f"{path}: has {size:,} bytes, but had {offset:,} when the checkpoint was saved")
    for name in LOG_FILES:
        try:
            truncate(logs_dir / name, offsets.get(name, 0))
        except OSError as error:
            raise RunLogError(f"{logs_dir / name}: cannot be cut back to the checkpoint: {error.strerror}") from None
