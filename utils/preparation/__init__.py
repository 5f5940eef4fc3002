"""Texts into prepared datasets: duplicates and packing, with numpy."""
