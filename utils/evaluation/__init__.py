"""The package behind evaluate.py: losses of whole texts, and tasks with a right answer."""
