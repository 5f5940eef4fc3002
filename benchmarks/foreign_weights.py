"""Convert models of transformers to our own, for comparisons only."""

from __future__ import annotations

from typing import Any

import torch

from model import LanguageModel
from utils.config.settings import ModelConfig


def from_gpt2(theirs: Any) -> LanguageModel:
    """Our model, in eval mode, with the weights of a GPT2LMHeadModel, whose linear layers store theirs transposed."""
    config = theirs.config
    ours = LanguageModel(
        ModelConfig(
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            block_size=config.n_positions,
            dropout=0.0,
            position="learned",
            norm="layernorm",
            norm_eps=config.layer_norm_epsilon,
            mlp="gelu_tanh",
            bias=True,
            tie_embeddings=True,
        ),
        config.vocab_size,
    )
    body = theirs.transformer
    weights = {"token_embedding.weight": body.wte.weight, "position_embedding.weight": body.wpe.weight}
    weights |= _of("final_norm", body.ln_f)
    for index, block in enumerate(body.h):
        name = f"blocks.{index}"
        weights |= _of(f"{name}.attention_norm", block.ln_1) | _of(f"{name}.mlp_norm", block.ln_2)
        weights |= _of(f"{name}.attention.qkv", block.attn.c_attn, transposed=True)
        weights |= _of(f"{name}.attention.proj", block.attn.c_proj, transposed=True)
        weights |= _of(f"{name}.mlp.up", block.mlp.c_fc, transposed=True)
        weights |= _of(f"{name}.mlp.proj", block.mlp.c_proj, transposed=True)
    ours.load_state_dict(weights)
    return ours.eval()


def from_llama(theirs: Any) -> LanguageModel:
    """Our model, in eval mode, with the weights of a LlamaForCausalLM."""
    config = theirs.config
    ours = LanguageModel(
        ModelConfig(
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            n_kv_head=config.num_key_value_heads,
            n_embd=config.hidden_size,
            ffn_dim=config.intermediate_size,
            block_size=config.max_position_embeddings,
            dropout=0.0,
            position="rope",
            norm="rmsnorm",
            norm_eps=config.rms_norm_eps,
            mlp="swiglu",
            bias=False,
            tie_embeddings=config.tie_word_embeddings,
        ),
        config.vocab_size,
    )
    body = theirs.model
    weights = {"token_embedding.weight": body.embed_tokens.weight} | _of("final_norm", body.norm)
    if not config.tie_word_embeddings:
        weights |= _of("head", theirs.lm_head)
    for index, block in enumerate(body.layers):
        name, attention, mlp = f"blocks.{index}", block.self_attn, block.mlp
        weights |= _of(f"{name}.attention_norm", block.input_layernorm)
        weights |= _of(f"{name}.mlp_norm", block.post_attention_layernorm)
        parts = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        weights[f"{name}.attention.qkv.weight"] = torch.cat(parts)
        weights |= _of(f"{name}.attention.proj", attention.o_proj)
        weights |= _of(f"{name}.mlp.gate", mlp.gate_proj) | _of(f"{name}.mlp.up", mlp.up_proj)
        weights |= _of(f"{name}.mlp.proj", mlp.down_proj)
    ours.load_state_dict(weights)
    return ours.eval()


def _of(name: str, module: Any, transposed: bool = False) -> dict[str, torch.Tensor]:
    weights = {f"{name}.weight": module.weight.t() if transposed else module.weight}
    if getattr(module, "bias", None) is not None:
        weights[f"{name}.bias"] = module.bias
    return weights
