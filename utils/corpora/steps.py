"""The steps of a cleaning pipeline, by name."""

from __future__ import annotations


class Step:
    """One step with its thresholds."""
