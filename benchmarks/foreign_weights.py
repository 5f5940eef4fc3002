"""Our own model with the weights of a transformers model, for comparisons."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from model import LanguageModel
from utils.formats.pretrained import open_pretrained


def from_transformers(theirs: Any) -> LanguageModel:
    """Our model, in eval mode, with the weights of a transformers model."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return open_pretrained(Path(folder)).load(torch.device("cpu"), torch.float32)
