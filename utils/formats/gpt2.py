"""GPT-2 [Radford et al. 2019]: learned positions, layer norms with biases, a fused q, k, v projection.

Its linear layers are of the class Conv1D, which stores (in, out). Older files have the causal mask as a tensor, and
names without the prefix `transformer.`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from utils.config.settings import ModelConfig
from utils.formats.foreign_config import ForeignConfig
from utils.formats.table import Family, Row

ROWS = (
    Row("transformer.wte.weight", "token_embedding.weight"),
    Row("transformer.wpe.weight", "position_embedding.weight"),
    Row("transformer.h.{}.ln_1.weight", "blocks.{}.attention_norm.weight"),
    Row("transformer.h.{}.ln_1.bias", "blocks.{}.attention_norm.bias", fill="zeros"),
    Row("transformer.h.{}.attn.c_attn.weight", "blocks.{}.attention.qkv.weight", layout="transposed"),
    Row("transformer.h.{}.attn.c_attn.bias", "blocks.{}.attention.qkv.bias", fill="zeros"),
    Row("transformer.h.{}.attn.c_proj.weight", "blocks.{}.attention.proj.weight", layout="transposed"),
    Row("transformer.h.{}.attn.c_proj.bias", "blocks.{}.attention.proj.bias", fill="zeros"),
    Row("transformer.h.{}.ln_2.weight", "blocks.{}.mlp_norm.weight"),
    Row("transformer.h.{}.ln_2.bias", "blocks.{}.mlp_norm.bias", fill="zeros"),
    Row("transformer.h.{}.mlp.c_fc.weight", "blocks.{}.mlp.up.weight", layout="transposed"),
    Row("transformer.h.{}.mlp.c_fc.bias", "blocks.{}.mlp.up.bias", fill="zeros"),
    Row("transformer.h.{}.mlp.c_proj.weight", "blocks.{}.mlp.proj.weight", layout="transposed"),
    Row("transformer.h.{}.mlp.c_proj.bias", "blocks.{}.mlp.proj.bias", fill="zeros"),
    Row("transformer.ln_f.weight", "final_norm.weight"),
    Row("transformer.ln_f.bias", "final_norm.bias", fill="zeros"),
    Row("lm_head.weight", "head.weight"),
)
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu2": "relu2",
}
THEIR_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu2": "relu2"}


def read(config: ForeignConfig) -> dict[str, Any]:
    config.only("scale_attn_weights", True)
    config.only("scale_attn_by_inverse_layer_idx", False)
    config.only("add_cross_attention", False)
    config.skip("reorder_and_upcast_attn", "resid_pdrop", "embd_pdrop", "attn_pdrop")
    n_embd = config.integer("n_embd", 768)
    return {
        "n_layer": config.integer("n_layer", 12),
        "n_head": config.integer("n_head", 12),
        "n_embd": n_embd,
        "ffn_dim": config.optional_integer("n_inner") or 4 * n_embd,
        "block_size": config.integer("n_positions", 1024),
        "position": "learned",
        "norm": "layernorm",
        "norm_eps": config.number("layer_norm_epsilon", 1e-5),
        "mlp": config.choice("activation_function", ACTIVATIONS, "gelu_new"),
        "bias": True,
        "tie_embeddings": config.flag("tie_word_embeddings", True),
    }


def write(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.ffn_width,
        "n_positions": config.block_size,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": THEIR_ACTIVATIONS[config.mlp],
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
    }


def obstacles(config: ModelConfig) -> Iterator[str]:
    if config.kv_heads != config.n_head:
        yield f"n_kv_head {config.kv_heads}"
    if config.head_width * config.n_head != config.n_embd:
        yield f"head_dim {config.head_width}"


GPT2 = Family(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    prefix="transformer.",
    rows=ROWS,
    ignored=re.compile(r"h\.\d+\.attn\.(bias|masked_bias)|lm_head\.weight"),
    holds={
        "position": ("learned",),
        "norm": ("layernorm",),
        "mlp": tuple(THEIR_ACTIVATIONS),
        "qk_norm": (False,),
        "ngram_rows": ((),),
        "sliding_window": (None,),
        "logit_softcap": (None,),
        "head_bias": (False,),
    },
    obstacles=obstacles,
    read=read,
    write=write,
)
