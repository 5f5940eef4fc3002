"""Run directories: their files, their log, their names and their index."""
