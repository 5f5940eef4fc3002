"""The loss of the output head without its logits: cross-entropy in chunks of rows.

With a large vocabulary the logits are the largest tensors of a training step: 65,536 rows of 50,304 are 6.6 GB in
bfloat16, and cross-entropy in float32 keeps two more such tensors of twice the size. Here the forward pass works
through chunks of rows: it computes the logits of a chunk, their loss, their gradient, and from that the chunk's part of
the gradients of the hidden states and the weight, before it begins the next chunk. So only one chunk of logits exists
at a time [Wijmans et al. 2025, Cut Your Losses; Hsu et al. 2024, Liger Kernel], and no logits are computed twice: the
backward pass only scales the gradients.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from utils.nn.float8 import VALUES, product, rounded
from utils.nn.linear import once_differentiable, product_dtype
from utils.nn.targets import IGNORED

ALIGNMENT = 128  # rows of the weight: matrix products of other sizes miss the fast kernels
SMALL_VOCABULARY = 4096  # below, the logits are small beside the rest, and one compiled kernel is faster than chunks
CHUNK_LOGITS = 1 << 30  # at most: 2 GB in bfloat16, or 16,384 rows with GPT-2's vocabulary (docs/LOG.md)

# Overwrites logits (n, V) with the gradient of the sum of their losses; returns the losses, (n,).
LossesAndGradient = Callable[[torch.Tensor, torch.Tensor, float | None], torch.Tensor]

# Maps the number of a chunk to its logits, (n, V + padding).
LogitsProduct = Callable[[int], torch.Tensor]


def rows_at_once(device: torch.device, rows: int, vocab_size: int) -> int:
    """The rows of a chunk, or 0 for plain cross-entropy.

    Plain cross-entropy is faster for a small vocabulary, and on a CPU it keeps the bits of earlier losses. Otherwise
    the rows are halved until a chunk is small enough, so a batch whose size is a power of two gives equal chunks.
    """
    if device.type != "cuda" or vocab_size < SMALL_VOCABULARY:
        return 0
    while rows * vocab_size > CHUNK_LOGITS and rows > 1:
        rows = -(-rows // 2)
    return rows


def plain_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy, () in nats per target, of logits (..., V) and targets (...)."""
    return F.cross_entropy(logits.view(-1, logits.size(-1)).float(), targets.reshape(-1))


def losses_and_gradient(logits: torch.Tensor, targets: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """The loss of each row in nats; the logits are overwritten with the gradient of the sum of the losses.

    On a GPU `utils.nn.cross_entropy_kernel` computes the same in one kernel if it works: see `fastest_loss_kernel`.

    Args:
        logits: (n, V), before the soft cap. The gradient is not divided by the number of rows, so it lies between -1
            and 1, which float16 can hold.
        targets: (n,); the loss of a row whose target is IGNORED is 0.
        softcap: replace the logits by softcap tanh(logits / softcap) [Gemma Team 2024, Gemma 2]; None: do not.

    Returns:
        (n,), in float32 or the precision of the logits, whichever is higher.
    """
    precision = torch.promote_types(logits.dtype, torch.float32)
    counted = targets != IGNORED  # (n,)
    columns = targets.where(counted, 0)[:, None]  # (n, 1)
    if softcap is None:
        log_probabilities = logits.log_softmax(-1, dtype=precision)  # (n, V)
    else:
        squashed = torch.tanh(logits.to(precision) / softcap)  # (n, V)
        log_probabilities = (softcap * squashed).log_softmax(-1)
    losses = -log_probabilities.gather(1, columns).squeeze(1)  # (n,)
    is_target = torch.arange(logits.size(1), device=logits.device) == columns  # (n, V)
    gradient = log_probabilities.exp_().sub_(is_target.to(precision))
    if softcap is not None:
        gradient = gradient.mul_(1 - squashed.square())
    logits.copy_(gradient.mul_(counted[:, None]))
    return losses.where(counted, 0.0)


def fastest_loss_kernel(
    device: torch.device, dtype: torch.dtype, vocab_size: int, softcap: float | None
) -> LossesAndGradient:
    """The Triton kernel if it works, else `losses_and_gradient`, which torch.compile turns into a kernel of its own."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return losses_and_gradient
    return kernel_on(device, dtype, vocab_size, softcap) or losses_and_gradient


@functools.cache
def kernel_on(
    device: torch.device, dtype: torch.dtype, vocab_size: int, softcap: float | None
) -> LossesAndGradient | None:
    """The Triton kernel for such logits, tried once; None if it does not work.

    The trial has the width, padding and cap of the real logits, so the code that it compiles is used from then on.
    Triton is part of torch's builds for CUDA on Linux and needs a C compiler.
    """
    if torch.finfo(dtype).bits > 32:
        return None
    try:
        from utils.nn.cross_entropy_kernel import losses_and_gradient as kernel
    except ImportError:
        return None
    try:
        logits = torch.zeros(1, vocab_size + -vocab_size % ALIGNMENT, device=device, dtype=dtype)
        kernel(logits[:, :vocab_size], torch.zeros(1, device=device).long(), softcap)
    except Exception as error:  # a compiler can fail in any way, and torch's own kernels do not need it
        warnings.warn(
            f"no Triton, so the loss is slower: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=2
        )
        return None
    return kernel


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    rows: int,
    softcap: float | None = None,
    fp8: bool = False,
) -> torch.Tensor:
    """The mean cross-entropy of the logits `hidden weight^T`, in nats per target; it has no second derivative.

    The products are in the precision of autocast, if that is on. The gradient of the weight is summed in float32.

    Args:
        hidden: (N, C).
        weight: (V, C).
        targets: (N,), int64; those that are IGNORED do not count. If all are, the loss is 0.
        rows: the rows of a chunk, see `rows_at_once`.
        softcap: the cap on the logits, see `losses_and_gradient`.
        fp8: compute the logits, but not the gradients, in 8 bits (C must be a multiple of 16); without gradients,
            this has no effect.

    Returns:
        (), in float32 or the precision of `hidden`, whichever is higher.
    """
    if torch.is_grad_enabled():
        return ChunkedCrossEntropy.apply(hidden, weight, targets, rows, softcap, fp8)
    dtype = product_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        matrix = padded(weight, dtype)  # (V + padding, C)
        multiply = logits_product(hidden.to(dtype), matrix, rows)
        chunks = gradients_of_logits(multiply, len(weight), targets, rows, softcap)
        return torch.cat([losses for losses, _ in chunks]).sum() / (targets != IGNORED).sum().clamp(min=1)


class ChunkedCrossEntropy(torch.autograd.Function):
    """`chunked_cross_entropy` with gradients, which the forward pass computes."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        rows: int,
        softcap: float | None,
        fp8: bool,
    ) -> torch.Tensor:
        dtype = product_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = padded(weight, dtype)  # (V + padding, C)
            x = hidden.to(dtype)
            grad_x = torch.empty_like(x)
            grad_matrix = torch.zeros_like(matrix, dtype=torch.promote_types(dtype, torch.float32))
            multiply = float8_logits_product(x, matrix, rows) if fp8 else logits_product(x, matrix, rows)
            chunks = gradients_of_logits(multiply, len(weight), targets, rows, softcap)
            all_losses = []
            for (losses, grad_logits), part, grad_part in zip(chunks, x.split(rows), grad_x.split(rows), strict=True):
                torch.mm(grad_logits, matrix, out=grad_part)
                if ctx.needs_input_grad[1]:
                    add_product(grad_matrix, grad_logits.t(), part)
                all_losses.append(losses)
            count = (targets != IGNORED).sum().clamp(min=1)
            ctx.save_for_backward(grad_x, grad_matrix, count)
            ctx.dtypes, ctx.vocab_size = (hidden.dtype, weight.dtype), len(weight)
            return torch.cat(all_losses).sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_x, grad_matrix, count = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        scale = (gradient / count).reshape(1)  # with a dimension: as a scalar it would be rounded to 16 bits
        return (
            (grad_x * scale).to(ctx.dtypes[0]) if needs_hidden else None,
            (grad_matrix[: ctx.vocab_size] * scale).to(ctx.dtypes[1]) if needs_weight else None,
            *(None, None, None, None),
        )


def padded(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight (V, C) in `dtype`, padded with rows of zeros to a multiple of ALIGNMENT."""
    return F.pad(weight.to(dtype), (0, 0, 0, -len(weight) % ALIGNMENT)) if len(weight) % ALIGNMENT else weight.to(dtype)


def logits_product(x: torch.Tensor, matrix: torch.Tensor, rows: int) -> LogitsProduct:
    """x matrix^T of (N, C) and (V + padding, C), chunk by chunk; each chunk overwrites the one before it."""
    parts, logits = x.split(rows), x.new_empty(min(rows, len(x)), len(matrix))
    return lambda chunk: torch.mm(parts[chunk], matrix.t(), out=logits[: len(parts[chunk])])


def float8_logits_product(x: torch.Tensor, matrix: torch.Tensor, rows: int) -> LogitsProduct:
    """Like `logits_product`, but in 8 bits, with one scale for each operand."""
    (x8, x_scale), (matrix8, matrix_scale) = rounded(x, VALUES), rounded(matrix, VALUES)
    parts = x8.split(rows)
    return lambda chunk: product(parts[chunk], matrix8, x_scale, matrix_scale, x.dtype, fast=True)


def gradients_of_logits(
    multiply: LogitsProduct,
    vocab_size: int,
    targets: torch.Tensor,
    rows: int,
    softcap: float | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield each chunk's losses (n,) and the gradient of its logits (n, V + padding), which the next may overwrite.

    The columns of padding take part in no loss. Their logits are zero, which serves as their gradient.
    """
    loss_kernel: LossesAndGradient | None = None
    for chunk, targets_of_chunk in enumerate(targets.split(rows)):
        logits = multiply(chunk)
        loss_kernel = loss_kernel or fastest_loss_kernel(logits.device, logits.dtype, vocab_size, softcap)
        yield loss_kernel(logits[:, :vocab_size], targets_of_chunk, softcap), logits
        del logits


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, with a (M, K), b (K, N), and `total` in the same or a higher precision."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and not torch.compiler.is_compiling() and adds_to_float32(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


@functools.cache
def adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch can add the product of matrices in this precision to a float32 matrix; older releases cannot."""
    total, a = torch.zeros(16, 16, device=device), torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, a, a, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return True
