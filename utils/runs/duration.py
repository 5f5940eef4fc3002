"""How long a run has trained, and when it paused, by the times in its run.json."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from utils.runs.layout import LOCK, METRICS_LOG


def seconds_of(moment: Any) -> float | None:
    """Convert a time in run.json to seconds since the epoch; None if it is not a time."""
    try:
        return datetime.fromisoformat(moment).timestamp()
    except (TypeError, ValueError):
        return None


def resume_times(record: Mapping[str, Any]) -> list[float]:
    """The times at which the run was resumed, in seconds since the epoch; before each of them there was a pause."""
    starts = (seconds_of(session.get("time")) for session in _resumes(record))
    return [start for start in starts if start is not None]


def _resumes(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [session for session in record.get("resumes") or [] if isinstance(session, dict)]


def duration_of(path: Path, record: Mapping[str, Any], *, alive: bool) -> float:
    """Seconds that all sessions of a run took together.

    When a session ends, it records its duration by a monotonic clock. If that is missing, because the session was
    killed or the record is older, wall time counts, from its start to its end or last sign of life, but at least zero.

    Args:
        alive: whether the last session is still running, so that it counts until now.
    """
    resumes = _resumes(record)
    starts = [seconds_of(record.get("start")), *(seconds_of(session.get("time")) for session in resumes)]
    befores = (session.get("before") or {} for session in resumes)
    ends = [*(seconds_of(before.get("end")) for before in befores), seconds_of(record.get("end"))]
    total, recorded = 0.0, record.get("seconds")
    if isinstance(recorded, int | float) and math.isfinite(recorded):
        if record.get("status") != "running":
            return float(recorded)
        total, starts, ends = float(recorded), starts[-1:], ends[-1:]
    if ends[-1] is None and record.get("status") == "running":
        ends[-1] = time.time() if alive else _last_sign_of_life(path)
    spans = (end - start for start, end in zip(starts, ends, strict=True) if start is not None and end is not None)
    return total + sum(max(0.0, span) for span in spans)


def _last_sign_of_life(path: Path) -> float | None:
    """The time of the heartbeat, which may lag by HEARTBEAT_SECONDS, or that of the last log record if it is later."""
    from utils.runs.log import last_record  # here, so that --help does not import orjson

    times = []
    with contextlib.suppress(OSError):
        times.append((path / LOCK).stat().st_mtime)
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):  # a damaged log
        logged = float((last_record(path / METRICS_LOG) or {})["time"])
        if logged < time.time():  # neither NaN nor from a clock that is ahead
            times.append(logged)
    return max(times, default=None)
