"""Causal self-attention; for short sequences on a CPU its own way, with a faster backward pass than torch's.

torch's kernel for CPUs multiplies blocks of 32 rows one by one. Where all scores of a sequence fit into the cache,
one batched product over all sequences and heads is up to twice as fast (docs/LOG.md).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

SHORT = 128  # tokens; from about 192 on torch's kernel is as fast, and it needs no memory for the scores


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    """Each token attends to itself and the tokens before it.

    Args:
        q: (B, H, T, D).
        k, v: (B, K, T, D); H / K query heads share a key/value head [Ainslie et al. 2023].
        dropout: of attention weights.

    Returns:
        (B, H, T, D).
    """
    by_products = (
        q.device.type == "cpu"
        and q.dtype == torch.float32
        and q.shape == k.shape
        and 1 < q.size(2) <= SHORT
        and not dropout
        and not torch.compiler.is_compiling()
    )
    if by_products:
        return ShortAttention.apply(q, k, v)
    return F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=q.size(2) > 1, enable_gqa=q.size(1) != k.size(1)
    )


@functools.lru_cache(maxsize=4)
def causal_mask(length: int) -> torch.Tensor:
    """(T, T): minus infinity where the column is a token that comes after the row's, else 0."""
    return torch.full((length, length), -math.inf).triu(1)


class ShortAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D)) v and its gradients as seven batched matrix products. No gradients of gradients."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        B, H, T, D = q.shape
        q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
        scores = torch.baddbmm(causal_mask(T), q, k.transpose(1, 2), alpha=D**-0.5)  # (B * H, T, T)
        weights = scores.softmax(dim=-1)
        ctx.save_for_backward(q, k, v, weights)
        return torch.bmm(weights, v).view(B, H, T, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v, weights = ctx.saved_tensors
        B, H, T, D = gradient.shape
        rows = gradient.reshape(B * H, T, D)
        of_v = torch.bmm(weights.transpose(1, 2), rows)
        of_weights = torch.bmm(rows, v.transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, torch.float32)
        of_q = torch.baddbmm(of_v, of_scores, k, beta=0, alpha=D**-0.5)  # with beta = 0 the first one is not read
        of_k = torch.baddbmm(of_v, of_scores.transpose(1, 2), q, beta=0, alpha=D**-0.5)
        return of_q.view(B, H, T, D), of_k.view(B, H, T, D), of_v.view(B, H, T, D)
