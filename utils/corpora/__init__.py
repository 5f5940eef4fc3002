"""Texts: their sources, how they are read and cleaned, and the format of prepared datasets."""
