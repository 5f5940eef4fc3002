"""Run directories: their files, logs, names and index."""
