"""How many floating-point operations a model needs, by counting its matrix products."""

from __future__ import annotations

from utils.config import ModelConfig


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
