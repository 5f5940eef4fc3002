"""What inference.py does: decode, sample, score and export a model."""
