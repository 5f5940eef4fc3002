"""Which of torch's attention kernels a GPU uses, in which order they are tried, and why one is not available."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F

FUSED = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION"}  # neither keeps the scores of all pairs of tokens
OTHERS = ("EFFICIENT_ATTENTION", "MATH")
HOPPER = 9  # the major compute capability of H100 and H200

# The fastest first, in training on Hopper. cuDNN's backward pass does not repeat bit for bit, so torch does not use it
# with deterministic algorithms; FlashAttention's backward pass then repeats.
ORDER = ("cudnn", "flash")
OLDEST_CUDNN = 91501  # 9.15.1; older ones are wrong for lengths that are not multiples of 128: pytorch/pytorch#169849


def attention_order(device: torch.device) -> AbstractContextManager[None]:
    """A context in which the fused kernels are tried in ORDER; restores torch's own order on exit.

    It changes nothing on GPUs other than Hopper, or if cuDNN is older than OLDEST_CUDNN.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != HOPPER:
        return contextlib.nullcontext()
    if (torch.backends.cudnn.version() or 0) < OLDEST_CUDNN:
        return contextlib.nullcontext()
    return _only(*(FUSED[name] for name in ORDER), *OTHERS)


def fused_attention(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_width: int, tokens: int, dropout: float
) -> tuple[str, str]:
    """Find the fused kernel that causal attention uses on a CUDA device, by a trial of each.

    Returns:
        The name of the kernel, a key of FUSED, or "" if there is none; and torch's reasons against those before it in
        ORDER.
    """
    reasons: list[str] = []
    for name in ORDER:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            problem = _try(name, device, dtype, (heads, kv_heads), head_width, tokens, dropout)
        if problem is None:
            return name, "; ".join(reasons)
        messages = [str(warning.message) for warning in caught]
        reasons.append(f"{name}: {_reason(name, messages) or ' '.join(problem.split())}")
    return "", "; ".join(reasons)


def _try(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_width: int,
    tokens: int,
    dropout: float,
) -> str | None:
    """Run one kernel forward and backward on zeros; returns its error message, or None."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.enable_grad(), _only(FUSED[name]):
        q, k, v = (
            torch.zeros(1, count, tokens, head_width, device=device, dtype=dtype, requires_grad=True)
            for count in (heads[0], heads[1], heads[1])
        )
        try:
            y = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=heads[0] != heads[1]
            )
            y.sum().backward()
        except RuntimeError as error:
            return str(error)
    return None


def _only(*backends: str) -> AbstractContextManager[None]:
    """A context in which attention uses the first of these kernels that it can, and no other."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([getattr(SDPBackend, name) for name in backends], set_priority=True)


def _reason(name: str, messages: Sequence[str]) -> str:
    """The reason against a kernel in torch's warnings, on one line without the place in torch's source; or ""."""
    for heading, reason in itertools.pairwise(messages):
        if heading.lower().startswith(f"{name} attention kernel not used"):
            return " ".join(reason.split(" (Triggered internally at ")[0].split())
    return ""
