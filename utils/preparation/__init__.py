"""Texts into prepared datasets, with numpy: documents that repeat others."""
