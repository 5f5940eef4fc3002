"""Writes a run with an export as a training leaves it, without training."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch

from model import LanguageModel
from tokenizer import Tokenizer, tokenizer_from_json
from utils.config.settings import ModelConfig
from utils.inference.export import save_export


def char_tokenizer(vocabulary: Iterable[str], unknown_token: str | None = None) -> Tokenizer:
    """A character tokenizer with ids in the order of `vocabulary`."""
    vocabulary = list(vocabulary)
    if unknown_token is not None and unknown_token not in vocabulary:
        vocabulary.append(unknown_token)
    form = {"type": "char", "version": 1, "vocabulary": vocabulary, "unknown_token": unknown_token}
    return tokenizer_from_json(form, "a test")


M = TypeVar("M", bound=torch.nn.Module)
TOKENIZER = char_tokenizer(" \nabcdefghijklmnopqrstuvwxyzüABQ:?.")
BLOCK_SIZE = 16


def lively(model: M, scale: float = 0.3) -> M:
    """`model` in eval mode, with weights so large that each part matters and a token depends on all before it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model.eval()


def tiny_model(tokenizer: Tokenizer = TOKENIZER, **settings: Any) -> LanguageModel:
    torch.manual_seed(0)
    tiny = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": BLOCK_SIZE, "position": "rope"}
    return lively(LanguageModel(ModelConfig(**tiny | settings), tokenizer.vocab_size))


def save_tiny_run(runs_dir: Path, name: str, tokenizer: Tokenizer = TOKENIZER, **settings: Any) -> Path:
    """Write a run with an export, and return its directory."""
    run = runs_dir / name
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"id": name, "start": "2026-01-31T14:25:01.000+00:00"}))
    training = {"run": name, "step": 100, "val/loss": 1.5}
    save_export(run / "artifacts" / "export", tiny_model(tokenizer, **settings), tokenizer, training)
    return run
