"""Causal self-attention, with a faster backward pass than torch's for short sequences on a CPU.

torch's kernel for CPUs multiplies blocks of 32 rows one by one. If all scores of a sequence fit into the cache, one
batched product over all sequences and heads is up to twice as fast (docs/LOG.md).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F

from utils.nn.linear import once_differentiable
from utils.nn.private import private_operator

SOFTMAX_BACKWARD = private_operator("_softmax_backward_data")
SHORT_TOKENS = 128  # from about 192, torch's kernel is as fast, and it needs no memory for the scores


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout: float = 0.0,
    mask: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Each token attends to itself and the tokens before it.

    Args:
        q: (B, T, H, D); H / K query heads share a key/value head [Ainslie et al. 2023].
        k, v: (B, T, K, D).
        dropout: the probability of dropping an attention weight.
        mask: (B, 1, T, T), added to the scores: a causal mask that excludes further tokens; None excludes none.
        window: the maximum number of tokens that a token attends to, itself included; None: no limit.

    Returns:
        (B, T, H * D).
    """
    B, T, H, _ = q.shape
    if window is not None and window < T:
        mask = window_mask(T, window, q) if mask is None else mask + window_mask(T, window, mask)
    use_products = (
        q.is_cpu
        and SOFTMAX_BACKWARD is not None
        and q.dtype is v.dtype is torch.float32
        and q.shape == v.shape
        and 1 < T <= SHORT_TOKENS
        and not dropout
        and not torch.compiler.is_compiling()
    )
    if use_products:
        return ShortAttention.apply(q, k, v, mask)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H | K, T, D)
    if mask is None:
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=T > 1, enable_gqa=k.size(1) != H
        )  # (B, H, T, D)
    else:
        if k.size(1) != H:  # the kernels that take a mask do not support grouped queries
            k, v = (x.repeat_interleave(H // x.size(1), dim=1) for x in (k, v))  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, mask.to(q.dtype), dropout)
    return y.transpose(1, 2).reshape(B, T, -1)


@functools.lru_cache(maxsize=8)
def causal_mask(length: int) -> torch.Tensor:
    """The mask (length, length) to add to the scores: minus infinity above the diagonal, zero elsewhere."""
    return torch.full((length, length), -math.inf, dtype=torch.float32, device="cpu").triu_(1)


def window_mask(length: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """The mask (1, 1, length, length) to add to the scores: zero for the last `window` tokens, else minus infinity.

    Args:
        like: a tensor that has the device and precision of the mask.
    """
    positions = torch.arange(length, device=like.device)
    back = positions[:, None] - positions
    zero = torch.zeros((), dtype=like.dtype, device=like.device)
    return torch.where((back >= 0) & (back < window), zero, -math.inf)[None, None]


class ShortAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D)) v and its gradients as seven batched matrix products; it has no second derivative."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        B, T, H, D = q.shape
        q, k, v = (x.transpose(1, 2).reshape(B * H, T, D) for x in (q, k, v))
        if mask is None:
            is_fake = type(q) is not torch.Tensor  # a mask made here would be fake, too, and must not be cached
            mask = (causal_mask.__wrapped__ if is_fake else causal_mask)(T)
        else:
            mask = mask.expand(B, H, T, T).reshape(B * H, T, T)
        scores = torch.baddbmm(mask, q, k.mT, alpha=D**-0.5)  # (B * H, T, T)
        weights = scores.softmax(dim=-1)
        ctx.save_for_backward(q, k, v, weights)
        return torch.bmm(weights, v).view(B, H, T, D).transpose(1, 2).reshape(B, T, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        assert SOFTMAX_BACKWARD is not None
        q, k, v, weights = ctx.saved_tensors
        B, (T, D) = gradient.size(0), v.shape[1:]
        rows = gradient.view(B, T, -1, D).transpose(1, 2).reshape(-1, T, D)  # (B * H, T, D)
        grad_v = torch.bmm(weights.mT, rows)
        grad_scores = SOFTMAX_BACKWARD(torch.bmm(rows, v.mT), weights, -1, torch.float32)
        grad_q = torch.baddbmm(grad_v, grad_scores, k, beta=0, alpha=D**-0.5)  # with beta = 0 grad_v is not read
        grad_k = torch.baddbmm(grad_v, grad_scores.mT, q, beta=0, alpha=D**-0.5)
        return *(x.view(B, -1, T, D).transpose(1, 2) for x in (grad_q, grad_k, grad_v)), None
