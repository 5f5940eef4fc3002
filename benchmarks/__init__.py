"""Measured comparisons: each module is a command that prints a table (python -m benchmarks.NAME)."""
