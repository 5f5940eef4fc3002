"""Llama [Touvron et al. 2023], and what the families that differ from it in a few points share.

Rotary positions in the half-split layout, like ours (Meta's own files interleave the channels), RMS norms, gated MLPs,
grouped-query attention. SmolLM and SmolLM2 are Llamas.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from utils.config.settings import ModelConfig
from utils.formats.foreign_config import ForeignConfig, rope_keys, rope_settings
from utils.formats.table import Family, Row

ROWS = (
    Row("model.embed_tokens.weight", "token_embedding.weight"),
    Row("model.layers.{}.input_layernorm.weight", "blocks.{}.attention_norm.weight"),
    Row("model.layers.{}.self_attn.q_proj.weight", "blocks.{}.attention.qkv.weight", part="q"),
    Row("model.layers.{}.self_attn.k_proj.weight", "blocks.{}.attention.qkv.weight", part="k"),
    Row("model.layers.{}.self_attn.v_proj.weight", "blocks.{}.attention.qkv.weight", part="v"),
    Row("model.layers.{}.self_attn.q_proj.bias", "blocks.{}.attention.qkv.bias", part="q"),
    Row("model.layers.{}.self_attn.k_proj.bias", "blocks.{}.attention.qkv.bias", part="k"),
    Row("model.layers.{}.self_attn.v_proj.bias", "blocks.{}.attention.qkv.bias", part="v"),
    Row("model.layers.{}.self_attn.o_proj.weight", "blocks.{}.attention.proj.weight"),
    Row("model.layers.{}.self_attn.o_proj.bias", "blocks.{}.attention.proj.bias"),
    Row("model.layers.{}.post_attention_layernorm.weight", "blocks.{}.mlp_norm.weight"),
    Row("model.layers.{}.mlp.gate_proj.weight", "blocks.{}.mlp.gate.weight"),
    Row("model.layers.{}.mlp.gate_proj.bias", "blocks.{}.mlp.gate.bias"),
    Row("model.layers.{}.mlp.up_proj.weight", "blocks.{}.mlp.up.weight"),
    Row("model.layers.{}.mlp.up_proj.bias", "blocks.{}.mlp.up.bias"),
    Row("model.layers.{}.mlp.down_proj.weight", "blocks.{}.mlp.proj.weight"),
    Row("model.layers.{}.mlp.down_proj.bias", "blocks.{}.mlp.proj.bias"),
    Row("model.norm.weight", "final_norm.weight"),
    Row("lm_head.weight", "head.weight"),
)
IGNORED = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|lm_head\.weight")
HOLDS: dict[str, tuple[Any, ...]] = {
    "position": ("rope",),
    "norm": ("rmsnorm",),
    "mlp": ("swiglu",),
    "ngram_rows": ((),),
    "logit_softcap": (None,),
    "head_bias": (False,),
}
MOST_POSITIONS = 65536  # the largest block_size; rotary positions have no weights, so a model can be cut to any context


def read_shared(config: ForeignConfig) -> dict[str, Any]:
    """The settings that Llama-like families have in common, without biases."""
    config.only("hidden_act", "silu")
    config.skip("attention_dropout")
    context = config.integer("max_position_embeddings", 2048)
    n_head = config.integer("num_attention_heads", 32)
    return {
        "n_layer": config.integer("num_hidden_layers", 32),
        "n_head": n_head,
        "n_kv_head": config.integer("num_key_value_heads", n_head),
        "n_embd": config.integer("hidden_size", 4096),
        "head_dim": config.optional_integer("head_dim"),
        "ffn_dim": config.integer("intermediate_size"),
        "block_size": min(context, MOST_POSITIONS),
        **rope_settings(config, context),
        "norm": "rmsnorm",
        "norm_eps": config.number("rms_norm_eps", 1e-6),
        "mlp": "swiglu",
        "bias": False,
        "tie_embeddings": config.flag("tie_word_embeddings", False),
    }


def write_shared(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that Llama-like families have in common."""
    return {
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "hidden_size": config.n_embd,
        "head_dim": config.head_width,
        "intermediate_size": config.ffn_width,
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "attention_dropout": config.dropout,
        **rope_keys(config),
    }


def read(config: ForeignConfig) -> dict[str, Any]:
    settings = read_shared(config)
    attention, mlp = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    return settings | {"bias": attention, "mlp_bias": None if mlp == attention else mlp}


def write(config: ModelConfig) -> dict[str, Any]:
    return {**write_shared(config), "attention_bias": config.bias, "mlp_bias": config.has_mlp_bias}


def obstacles(config: ModelConfig) -> Iterator[str]:
    if config.n_embd % config.n_head:
        yield f"n_embd {config.n_embd}, which is not divisible by n_head {config.n_head}"
    if config.has_qkv_bias != config.bias:
        yield f"qkv_bias {str(config.has_qkv_bias).lower()} with bias {str(config.bias).lower()}"


LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    prefix="model.",
    rows=ROWS,
    ignored=IGNORED,
    holds={**HOLDS, "qk_norm": (False,), "sliding_window": (None,)},
    obstacles=obstacles,
    read=read,
    write=write,
)
