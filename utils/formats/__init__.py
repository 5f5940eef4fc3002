"""Weights of other programs: reading, comparing, converting and exporting them."""
