"""Causal self-attention; for short sequences on a CPU its own way, with a faster backward pass than torch's.

torch's kernel for CPUs multiplies blocks of 32 rows one by one. Where all scores of a sequence fit into the cache,
one batched product over all sequences and heads is up to twice as fast (docs/LOG.md).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

SHORT = 128  # tokens; from about 192 on torch's kernel is as fast, and it needs no memory for the scores


def causal_attention(qk: torch.Tensor, v: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    """Each token attends to itself and the tokens before it.

    Args:
        qk: (B, T, H + K, D), queries and then keys; H / K query heads share a key/value head [Ainslie et al. 2023].
        v: (B, T, K, D).
        dropout: of attention weights.

    Returns:
        (B, T, H * D).
    """
    B, T, K, _ = v.shape
    by_products = (
        v.device.type == "cpu"
        and v.dtype == qk.dtype == torch.float32
        and qk.size(2) == 2 * K
        and 1 < T <= SHORT
        and not dropout
        and not torch.compiler.is_compiling()
    )
    if by_products:
        return ShortAttention.apply(qk, v)
    q, k = qk.split((qk.size(2) - K, K), dim=2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H | K, T, D)
    y = F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=T > 1, enable_gqa=q.size(1) != K
    )  # (B, H, T, D)
    return y.transpose(1, 2).reshape(B, T, -1)


class ShortAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D)) v and its gradients as seven batched matrix products. No gradients of gradients."""

    @staticmethod
    def forward(ctx: Any, qk: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        B, T, H, D = v.shape
        qk = qk.reshape(B, T, 2, H, D).permute(2, 0, 3, 1, 4).reshape(2, B * H, T, D)
        v = v.transpose(1, 2).reshape(B * H, T, D)
        later = torch.full((T, T), -math.inf).triu_(1)  # no query may see what comes after it
        scores = torch.baddbmm(later, qk[0], qk[1].mT, alpha=D**-0.5)  # (B * H, T, T)
        weights = scores.softmax(dim=-1)
        ctx.save_for_backward(qk, v, weights)
        return torch.bmm(weights, v).view(B, H, T, D).transpose(1, 2).reshape(B, T, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        qk, v, weights = ctx.saved_tensors
        B, (T, D) = gradient.size(0), v.shape[1:]
        rows = gradient.view(B, T, -1, D).transpose(1, 2).reshape(-1, T, D)  # (B * H, T, D)
        of_v = torch.bmm(weights.mT, rows)
        of_scores = torch._softmax_backward_data(torch.bmm(rows, v.mT), weights, -1, torch.float32)
        of_qk = torch.empty_like(qk)
        torch.baddbmm(of_v, of_scores, qk[1], beta=0, alpha=D**-0.5, out=of_qk[0])  # with beta = 0 of_v is not read
        torch.baddbmm(of_v, of_scores.mT, qk[0], beta=0, alpha=D**-0.5, out=of_qk[1])
        return (
            of_qk.view(2, B, -1, T, D).permute(1, 3, 0, 2, 4).reshape(B, T, -1, D),
            of_v.view(B, -1, T, D).transpose(1, 2),
        )
