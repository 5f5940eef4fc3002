"""Qwen 2 and 2.5 [Yang et al. 2024]: Llama with biases of q, k and v. Qwen 3 [Yang et al. 2025]: Llama whose queries
and keys have norms with learned weights, and heads of any width. In both, later blocks may have a sliding window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from utils.config.settings import ModelConfig
from utils.formats.foreign_config import ForeignConfig, layer_windows
from utils.formats.llama import HOLDS, IGNORED, LLAMA, ROWS, read_shared, write_shared
from utils.formats.table import Family, Row


def read_qwen2(config: ForeignConfig) -> dict[str, Any]:
    settings = read_shared(config)
    return settings | {"qkv_bias": True} | layer_windows(config, settings["n_layer"])


def write_qwen2(config: ModelConfig) -> dict[str, Any]:
    return write_shared(config) | _window_keys(config)


def _window_keys(config: ModelConfig) -> dict[str, Any]:
    uses = config.sliding_window is not None
    return {
        "use_sliding_window": uses,
        "sliding_window": config.sliding_window,
        "max_window_layers": config.full_attention_layers if uses else config.n_layer,
    }


def obstacles_of_qwen2(config: ModelConfig) -> Iterator[str]:
    if config.bias:
        yield "bias true"
    if config.has_mlp_bias:
        yield "mlp_bias true"
    if not config.has_qkv_bias:
        yield "qkv_bias false"
    if config.head_width * config.n_head != config.n_embd:
        yield f"head_dim {config.head_width}"


def read_qwen3(config: ForeignConfig) -> dict[str, Any]:
    head_dim = config.integer("head_dim", 128)
    settings = {**read_shared(config), "head_dim": head_dim, "qk_norm": True, "qk_norm_weights": True}
    if config.flag("attention_bias", False):
        settings |= {"bias": True, "mlp_bias": False}
    return settings | layer_windows(config, settings["n_layer"])


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return {**write_shared(config), "attention_bias": config.bias, **_window_keys(config)}


def obstacles_of_qwen3(config: ModelConfig) -> Iterator[str]:
    if config.has_qkv_bias != config.bias:
        yield f"qkv_bias {str(config.has_qkv_bias).lower()} with bias {str(config.bias).lower()}"
    if config.has_mlp_bias:
        yield "mlp_bias true"


QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    prefix="model.",
    rows=ROWS,
    ignored=IGNORED,
    holds={**HOLDS, "qk_norm": (False,)},
    obstacles=obstacles_of_qwen2,
    read=read_qwen2,
    write=write_qwen2,
)
# Writes a Qwen 2 without a window as a Llama that computes the same; the bias of its output projection is zeros.
QWEN2_AS_LLAMA = replace(
    LLAMA,
    rows=tuple(replace(row, fill="zeros") if row.theirs.endswith("o_proj.bias") else row for row in ROWS),
    obstacles=obstacles_of_qwen2,
    write=lambda config: {**write_shared(config), "attention_bias": True, "mlp_bias": False},
)
QWEN3 = replace(
    QWEN2,
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    rows=(
        *ROWS,
        Row("model.layers.{}.self_attn.q_norm.weight", "blocks.{}.attention.q_norm.weight", fill="ones"),
        Row("model.layers.{}.self_attn.k_norm.weight", "blocks.{}.attention.k_norm.weight", fill="ones"),
    ),
    holds={**HOLDS, "qk_norm": (True,)},
    obstacles=obstacles_of_qwen3,
    read=read_qwen3,
    write=write_qwen3,
)
