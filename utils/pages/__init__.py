"""The pages of runs in a browser: a table of all runs, curves, one run, and comparisons."""
