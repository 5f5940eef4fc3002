"""What a model has and needs, counted from its shapes: parameters, and floating-point operations of matrix products."""

from __future__ import annotations

from utils.config.settings import ModelConfig


def parameter_count(config: ModelConfig, vocab_size: int) -> int:
    """Trainable numbers of a LanguageModel; to know them it need not be made."""
    C, F = config.n_embd, config.ffn_width
    heads, qkv = config.n_head * config.head_width, (config.n_head + 2 * config.kv_heads) * config.head_width
    norm = C * (2 if config.norm == "layernorm" and config.bias else 1)
    attention = C * qkv + heads * C + config.has_qkv_bias * qkv + config.bias * C
    inner = 2 if config.mlp == "swiglu" else 1  # matrices into the hidden width
    mlp = inner * (C * F + config.bias * F) + F * C + config.bias * C
    tables = vocab_size * (1 if config.tie_embeddings else 2) + sum(config.ngram_rows)
    if config.position == "learned":
        tables += config.block_size
    return tables * C + config.n_layer * (attention + mlp + 2 * norm) + norm


def forward_flops(config: ModelConfig, vocab_size: int, tokens: int, context: float) -> float:
    """Floating-point operations of a forward pass; a multiplication with an addition counts as two.

    Only matrix products count, as in PaLM's appendix B [Chowdhery et al. 2022]; norms, activations, softmax and
    lookups cost time, but no more than a few operations for each number.

    Args:
        tokens: positions that pass through the model, over all sequences.
        context: keys that a query meets on average: (T + 1) / 2 in causal attention over T tokens.
    """
    heads, kv_heads, width = config.n_head, config.kv_heads, config.head_width
    projections = config.n_embd * width * (2 * heads + 2 * kv_heads)  # q, k, v and the way back
    mlp = config.n_embd * config.ffn_width * (3 if config.mlp == "swiglu" else 2)
    attention = 2 * heads * width * context  # q k^T, and the weights times v
    return 2.0 * tokens * (config.n_layer * (projections + mlp + attention) + config.n_embd * vocab_size)


def training_flops(config: ModelConfig, vocab_size: int, batch_size: int) -> float:
    """Floating-point operations of one update's forward and backward passes: the backward pass costs twice the forward.

    Attention is counted as it is needed, the lower triangle; a kernel that computes all of it does more.
    """
    T = config.block_size
    return 3.0 * forward_flops(config, vocab_size, batch_size * T, (T + 1) / 2)
