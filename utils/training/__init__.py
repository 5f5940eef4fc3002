"""What train.py does: from the checks before a run to its result."""
