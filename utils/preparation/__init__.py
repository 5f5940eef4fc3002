"""The work of prepare.py: read texts, clean them, remove duplicates, and tokenize them into a dataset."""
