"""The row-wise part of the loss as one Triton kernel for GPUs.

One program computes one row. It reads the row twice: first for the maximum and the sum of exponentials, both in one
pass [Milakov and Gimelshein 2018, Online normalizer calculation for softmax], then to overwrite the logits with their
gradient [Hsu et al. 2024, Liger Kernel]; by then they are in the GPU's cache. No program waits for another, and none
adds atomically to memory, so the same logits give the same bits.

Importing this module fails if Triton is not installed: see `utils.nn.cross_entropy.kernel_on`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from utils.nn import targets as target_values

IGNORED = tl.constexpr(target_values.IGNORED)
LOWEST = tl.constexpr(-3.0e38)  # not -inf: the difference of two infinities is not a number
EIGHT = tl.constexpr(8)  # neighbouring columns that a thread loads: 16 bytes of bfloat16, one instruction
GROUPS, WARPS = 512, 8  # groups of eight columns that a program holds at a time, and its warps (docs/LOG.md)


def losses_and_gradient(logits: torch.Tensor, targets: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """`utils.nn.cross_entropy.losses_and_gradient` for logits of 16 or 32 bits whose rows are contiguous.

    The loss of a row is NaN if its target is neither a column of the logits nor IGNORED.
    """
    assert logits.stride(1) == 1
    assert logits.element_size() <= 4
    losses = torch.empty(len(logits), device=logits.device, dtype=torch.float32)
    with torch.cuda.device_of(logits):
        _one_row[(len(logits),)](
            *(logits, targets.contiguous(), losses, logits.stride(0)),
            VOCAB_SIZE=logits.size(1),
            SOFTCAP=softcap,
            GROUPS=GROUPS,
            num_warps=WARPS,
        )
    return losses


@triton.jit
def _one_row(
    logits: tl.tensor,
    targets: tl.tensor,
    losses: tl.tensor,
    stride: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    WHOLE: tl.constexpr = VOCAB_SIZE // EIGHT  # full groups; fewer than eight columns remain
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    is_column = (target >= 0) & (target < VOCAB_SIZE)
    target_logit = _capped(tl.load(logits + target, mask=is_column, other=float("nan")), SOFTCAP)
    in_group = tl.arange(0, EIGHT)
    remaining = WHOLE * EIGHT + in_group
    last = _capped(tl.load(logits + remaining, mask=remaining < VOCAB_SIZE, other=0.0), SOFTCAP)
    last = tl.where(remaining < VOCAB_SIZE, last, LOWEST)  # (EIGHT,)

    highest = tl.full((GROUPS,), LOWEST, tl.float32)  # running maxima and sums, combined after the loop
    total = tl.zeros((GROUPS,), tl.float32)
    for begin in tl.range(0, WHOLE, GROUPS, num_stages=1):
        groups = begin + tl.arange(0, GROUPS)[:, None]
        pointers = logits + groups * EIGHT + in_group[None, :]  # (GROUPS, EIGHT)
        x = _capped(tl.load(pointers, mask=groups < WHOLE, other=0.0, eviction_policy="evict_last"), SOFTCAP)
        x = tl.where(groups < WHOLE, x, float("-inf"))
        higher = tl.maximum(highest, tl.max(x, 1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher[:, None]), 1)
        highest = higher
    maximum = tl.maximum(tl.max(highest, 0), tl.max(last, 0))
    total = tl.sum(total * tl.exp(highest - maximum), 0) + tl.sum(tl.exp(last - maximum), 0)
    tl.store(losses + row, tl.where(target == IGNORED, 0.0, maximum - target_logit + tl.log(total)))
    scale = 1 / total

    for begin in tl.range(0, WHOLE, GROUPS, num_stages=1):
        groups = begin + tl.arange(0, GROUPS)[:, None]
        columns = groups * EIGHT + in_group[None, :]  # (GROUPS, EIGHT)
        x = _capped(tl.load(logits + columns, mask=groups < WHOLE, other=0.0, eviction_policy="evict_first"), SOFTCAP)
        tl.store(logits + columns, _gradient(x, columns, target, maximum, scale, SOFTCAP), mask=groups < WHOLE)
    tl.store(
        logits + remaining, _gradient(last, remaining, target, maximum, scale, SOFTCAP), mask=remaining < VOCAB_SIZE
    )


@triton.jit
def _capped(x: tl.tensor, SOFTCAP: tl.constexpr) -> tl.tensor:
    """softcap tanh(x / softcap) in float32; the GPU has an instruction for exponentials, but no exact one for tanh."""
    x = x.to(tl.float32)
    if SOFTCAP is not None:
        x = SOFTCAP - 2 * SOFTCAP / (tl.exp(x * (2 / SOFTCAP)) + 1)
    return x


@triton.jit
def _gradient(
    x: tl.tensor, columns: tl.tensor, target: tl.tensor, maximum: tl.tensor, scale: tl.tensor, SOFTCAP: tl.constexpr
) -> tl.tensor:
    """The gradient of a row's loss with respect to the logits before the soft cap; `x` are those after it."""
    gradient = tl.exp(x - maximum) * scale - tl.where(columns == target, 1.0, 0.0)
    if SOFTCAP is not None:
        gradient *= 1 - (x / SOFTCAP) * (x / SOFTCAP)
    return tl.where(target == IGNORED, 0.0, gradient)
