"""What prepare.py does: it reads texts, cleans them, removes duplicates, and tokenizes them into a dataset."""
