"""Mistral [Jiang et al. 2023]: Llama without biases, with a sliding window in every block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from utils.config.settings import ModelConfig
from utils.formats.foreign_config import ForeignConfig, sliding_window
from utils.formats.llama import HOLDS, IGNORED, ROWS, read_shared, write_shared
from utils.formats.table import Family


def read(config: ForeignConfig) -> dict[str, Any]:
    config.only("layer_types", None)
    grouped = config.integer("num_key_value_heads", 8)
    return {**read_shared(config), "n_kv_head": grouped, "sliding_window": sliding_window(config)}


def write(config: ModelConfig) -> dict[str, Any]:
    return {**write_shared(config), "sliding_window": config.sliding_window}


def obstacles(config: ModelConfig) -> Iterator[str]:
    for what, has in (("bias", config.bias), ("qkv_bias", config.has_qkv_bias), ("mlp_bias", config.has_mlp_bias)):
        if has:
            yield f"{what} true"
    if config.sliding_window is not None and config.full_attention_layers:
        yield f"full_attention_layers {config.full_attention_layers}"


MISTRAL = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    prefix="model.",
    rows=ROWS,
    ignored=IGNORED,
    holds={**HOLDS, "qk_norm": (False,)},
    obstacles=obstacles,
    read=read,
    write=write,
)
