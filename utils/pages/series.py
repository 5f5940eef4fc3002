"""The points of one metric of many runs, kept in memory and extended as their logs grow."""

from __future__ import annotations

import itertools
import os
import threading
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.experiments.curve import Axis
from utils.experiments.sql import MEMORY_LIMIT, escaped
from utils.files import is_regular, open_regular
from utils.runs.duration import resume_times
from utils.runs.index import IndexedRun
from utils.runs.layout import METRICS_LOG
from utils.runs.log import RunLogError, read_from
from utils.runs.metrics import decode_number

MOST_POINTS = 4_000_000  # kept in memory for all runs and metrics together; a point takes 32 bytes
SERIES_POINTS = 40  # the memory of a series without points, in points
CHECKED_BYTES = 256  # before the end of what was read; if they have changed, it is another log

QUERY = """
SELECT coalesce(step, 0), coalesce("time", 0), coalesce(tokens, 0), coalesce({value}, 0),
       step IS NOT NULL AND "time" IS NOT NULL, {value} IS NOT NULL, list_position($names, file)
FROM read_json($files, format = 'newline_delimited', columns = $columns, ignore_errors = true, filename = 'file')
     AS lines(step, "time", tokens, {columns}file)
"""
RESERVED = ("step", "time", "file")  # columns of the query, which no metric may be named after; DuckDB ignores case

_generations = itertools.count(1)


def _doubles() -> array[float]:
    return array("d")


@dataclass
class Series:
    """One metric of one run in the order of its log, with the place of each value on every axis, as in `Curve`.

    generation: a number that is new whenever the log is read from its beginning.
    offset: number of bytes of the log that were read.
    mark: a checksum of the bytes before `offset`.
    last_time: time of the last record, in seconds since the epoch; None: there is no record.
    elapsed: seconds of training up to the last record.
    problem: why the log cannot be read.
    """

    step: array[float] = field(default_factory=_doubles)
    tokens: array[float] = field(default_factory=_doubles)
    time: array[float] = field(default_factory=_doubles)
    values: array[float] = field(default_factory=_doubles)
    generation: int = field(default_factory=lambda: next(_generations))
    offset: int = 0
    mark: int = 0
    last_time: float | None = None
    elapsed: float = 0.0
    problem: str | None = None

    def places(self, axis: Axis) -> array[float]:
        """The place of each value on `axis`."""
        places: array[float] = getattr(self, axis)
        return places


class SeriesStore:
    """Series by run and metric; the least recently used ones are dropped when there are too many points."""

    def __init__(self) -> None:
        self._series: dict[tuple[Path, str], Series] = {}
        self._lock = threading.Lock()

    def read(self, runs: Sequence[IndexedRun], metric: str) -> list[Series]:
        """The series of each run, up to the current end of its log."""
        with self._lock:
            known = {run.path: self._series.pop((run.path, metric), None) for run in runs}
            for run in runs:
                series = known[run.path]
                if series is not None and not _extend(series, run, metric):
                    known[run.path] = None
            known |= _read_all([run for run in runs if known[run.path] is None], metric)
            found = {path: series for path, series in known.items() if series is not None}
            self._series |= {(path, metric): series for path, series in found.items()}
            self._drop()
            return [found[run.path] for run in runs]

    def _drop(self) -> None:
        total = sum(map(_size, self._series.values()))
        for key in list(self._series)[:-1]:
            if total <= MOST_POINTS:
                return
            total -= _size(self._series.pop(key))


def _size(series: Series) -> int:
    """The memory of a series, in points; a series without any takes some, too."""
    return SERIES_POINTS + len(series.values)


# ------------------------------------------------------------------------------- the rest of a log that has grown


def _extend(series: Series, run: IndexedRun, metric: str) -> bool:
    """Read what was appended to the log; returns False if it is no longer the same log."""
    log = run.path / METRICS_LOG
    try:
        size = log.stat().st_size
        if size < series.offset or (size != series.offset and _mark(log, run.path, series.offset) != series.mark):
            return False
        starts = resume_times(run.record)
        while size > series.offset:
            records, end = read_from(log, series.offset)
            if end == series.offset:
                break
            for record in records:
                _append(series, record, metric, starts)
            series.offset = end
            series.mark = _mark(log, run.path, end)
    except (OSError, RunLogError, KeyError, ValueError, TypeError):
        return False
    return True


def _append(series: Series, record: Mapping[str, Any], metric: str, starts: Sequence[float]) -> None:
    now, previous = record["time"], series.last_time
    if previous is not None and not any(previous < start <= now for start in starts):
        series.elapsed += max(0.0, now - previous)
    series.last_time = now
    if metric in record:
        series.step.append(record["step"])
        series.tokens.append(record.get("tokens", 0))
        series.time.append(series.elapsed)
        series.values.append(decode_number(record[metric]))


def _mark(log: Path, run: Path, offset: int) -> int:
    with open_regular(log, run) as file:
        file.seek(max(0, offset - CHECKED_BYTES))
        return zlib.crc32(file.read(min(offset, CHECKED_BYTES)))


# ------------------------------------------------------------------------------------------------------ whole logs


@dataclass(frozen=True)
class _Log:
    run: IndexedRun
    path: Path
    size: int


def _read_all(runs: Sequence[IndexedRun], metric: str) -> dict[Path, Series | None]:
    """Read whole logs with DuckDB, which is five times as fast as line by line."""
    found: dict[Path, Series | None] = {}
    logs = []
    for run in runs:
        log = run.path / METRICS_LOG
        if not run.readable or not is_regular(log, run.path):
            found[run.path] = Series(problem=run.problem or "no log yet")
        else:
            logs.append(_Log(run, log, log.stat().st_size))
    logs = [log for log in logs if log.size or not found.setdefault(log.run.path, Series())]
    if logs:
        found |= {log.run.path: series for log, series in _series_of(logs, metric)}
    return found


def _series_of(logs: Sequence[_Log], metric: str) -> Iterator[tuple[_Log, Series]]:
    """Read all logs with one query, or if one of them cannot be read, with a query for each."""
    import duckdb

    try:
        yield from list(_query(logs, metric))
    except (duckdb.Error, OSError):
        if len(logs) == 1:
            yield logs[0], Series(problem="the log is damaged: it cannot be read")
        else:
            for log in logs:
                yield from _series_of([log], metric)


def _query(logs: Sequence[_Log], metric: str) -> Iterator[tuple[_Log, Series]]:
    import duckdb

    names = [os.fspath(log.path) for log in logs]
    columns = {"step": "BIGINT", "time": "DOUBLE", "tokens": "BIGINT", metric: "DOUBLE"}
    value = "tokens" if metric == "tokens" else "value"
    query = QUERY.format(value=value, columns="" if metric == "tokens" else "value, ")
    parameters = {"names": names, "files": [escaped(name) for name in names], "columns": columns}
    with duckdb.connect(":memory:", config={"memory_limit": MEMORY_LIMIT}) as connection:
        *columns_read, place = connection.execute(query, parameters).fetchnumpy().values()
    bounds = [int(bound) for bound in place.searchsorted(range(1, len(logs) + 2))]
    for log, first, last in zip(logs, bounds, bounds[1:], strict=False):
        yield log, _series(log, *(column[first:last] for column in columns_read))


def _series(log: _Log, step: Any, time: Any, tokens: Any, values: Any, is_record: Any, has_value: Any) -> Series:
    """Make a series from the columns of a log: NumPy arrays with one row for each line that is not empty."""
    end, lines = _complete(log, len(step))
    step, time, tokens, values, is_record, has_value = (
        column[:lines] for column in (step, time, tokens, values, is_record, has_value)
    )
    series = Series(offset=end, mark=_mark(log.path, log.run.path, end))
    if not is_record.any():
        return series
    time = time[is_record]
    gaps = (time[1:] - time[:-1]).clip(min=0.0)
    for start in resume_times(log.run.record):
        gaps[(time[:-1] < start) & (time[1:] >= start)] = 0.0
    elapsed = time - time
    elapsed[1:] = gaps.cumsum()
    series.last_time, series.elapsed = float(time[-1]), float(elapsed[-1])
    has_value = has_value & is_record
    columns = (("step", step[has_value]), ("tokens", tokens[has_value]), ("values", values[has_value]))
    for name, column in (*columns, ("time", elapsed[has_value[is_record]])):
        getattr(series, name).frombytes(column.astype("f8").tobytes())
    return series


def _complete(log: _Log, rows: int) -> tuple[int, int]:
    """The bytes and the number of the complete lines that were read; later ones are torn, or were added meanwhile."""
    with open_regular(log.path, log.run.path) as file:
        file.seek(max(0, log.size - 1))
        is_whole = file.read(1) == b"\n"
        if is_whole and os.fstat(file.fileno()).st_size == log.size:
            return log.size, rows
        file.seek(0)
        end, lines, left = 0, 0, log.size
        while left and (data := file.read(min(left, 1 << 20))):
            if (last := data.rfind(b"\n")) >= 0:
                end = log.size - left + last + 1
                lines += data.count(b"\n")
            left -= len(data)
    return end, lines
