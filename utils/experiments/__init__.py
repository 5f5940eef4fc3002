"""What experiments.py does: compare, explain, plot, report, reproduce and tidy up runs."""
