"""The paths of a run directory, relative to it."""

from __future__ import annotations

from pathlib import Path

CHECKPOINTS = Path("artifacts", "checkpoints")  # in a run directory

FLIGHT_RECORDER = Path("artifacts", "flight_recorder.json")

CURVES = Path("artifacts", "curves.png")

PATCH = Path("meta", "code.patch")

TOKENIZER = Path("meta", "tokenizer.json")

MODEL_SUMMARY = Path("meta", "model.json")

METRICS = Path("meta", "metrics.json")
