"""Corpora: where their text comes from, and what is known of text that was encoded before."""
