"""The package behind evaluate.py: scores of whole texts, and tasks with right answers."""
