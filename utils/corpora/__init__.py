"""Texts: where they come from, how they are read and cleaned, and the format of prepared datasets."""
