"""Merge the adapters of a checkpoint into its weights, for code that needs a plain model."""

from __future__ import annotations

import dataclasses

from model import outline
from utils.checkpoints.files import Checkpoint
from utils.checkpoints.folder import STATE_FILE, CheckpointError
from utils.config.settings import ModelConfig, OptimizerConfig
from utils.nn.lora import add_adapters, merged_weights


def without_adapters(checkpoint: Checkpoint) -> Checkpoint:
    """Return `checkpoint` with its adapters merged into its weights, or `checkpoint` itself if it has none.

    Raises:
        CheckpointError: the description of the adapters does not fit the weights.
    """
    if "lora" not in checkpoint.state:
        return checkpoint
    try:
        config = ModelConfig.model_validate(checkpoint.state["model"])
        model = outline(config, len(checkpoint.weights["token_embedding.weight"]))
        add_adapters(model, config, OptimizerConfig.model_validate(checkpoint.state["lora"]))
        weights = merged_weights(model, checkpoint.weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.path / STATE_FILE}: damaged ({type(error).__name__}: {error})") from None
    state = {key: value for key, value in checkpoint.state.items() if key != "lora"}
    return dataclasses.replace(checkpoint, weights=weights, state=state)
