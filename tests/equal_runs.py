"""Two runs that must be equal to the last bit."""

from __future__ import annotations

from pathlib import Path

from benchmarks.run_equality import differences


def assert_equal_runs(one: Path, other: Path) -> None:
    """Weights, optimizer state, export, logs and the facts of the state are equal, except for times."""
    found = differences(one, other)
    assert not any(found.values()), found
