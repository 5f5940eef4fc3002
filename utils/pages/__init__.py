"""The pages of runs in a browser: a table of all, curves, one run, several compared."""
