"""Checkpoints on disk: complete or absent, without pickle."""
