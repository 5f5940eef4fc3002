"""Corpora: the sources of their text, and records of text that is already encoded."""
