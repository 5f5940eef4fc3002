"""The package behind inference.py: decoding, sampling, scoring and exports of a model."""
