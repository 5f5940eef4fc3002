"""Attention to short sequences: the numbers and gradients of torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from utils import attention as module
from utils.attention import SHORT, ShortAttention, causal_attention


def heads(batch: int, length: int, kv_heads: int = 3, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q, k and v as the model cuts them from one product: (B, 3 | K, T, 8), none contiguous."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, length, 3 + 2 * kv_heads, 8, generator=generator, dtype=dtype).requires_grad_()
    return [x.transpose(1, 2) for x in qkv.split((3, kv_heads, kv_heads), dim=2)]


@pytest.mark.parametrize("length", [2, 3, 64, SHORT])
@pytest.mark.parametrize("batch", [1, 4])
def test_short_attention_and_its_gradients_are_those_of_torch(batch: int, length: int) -> None:
    q, k, v = heads(batch, length)
    upstream = torch.randn(q.shape)
    ours, theirs = ShortAttention.apply(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(ours, theirs)
    for mine, reference in zip(
        *(torch.autograd.grad(y, (q, k, v), upstream, retain_graph=True) for y in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize(
    ("tensors", "dropout", "ours"),
    [
        (heads(2, SHORT), 0.0, True),
        (heads(2, SHORT + 1), 0.0, False),
        (heads(2, 1), 0.0, False),
        (heads(2, 8, kv_heads=1), 0.0, False),
        (heads(2, 8), 0.5, False),
        (heads(2, 8, dtype=torch.bfloat16), 0.0, False),
    ],
)
def test_all_else_stays_with_torch(
    tensors: list[torch.Tensor], dropout: float, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(module.ShortAttention, "apply", lambda *arguments: asked.append(arguments))
    result = causal_attention(*tensors, dropout)
    assert bool(asked) == ours
    assert ours or result.shape == tensors[0].shape


def test_no_token_sees_a_later_one() -> None:
    q, k, v = (x.detach().clone() for x in heads(1, 16))
    before = causal_attention(q, k, v)
    k[:, :, 9:], v[:, :, 9:] = 100.0, 100.0
    after = causal_attention(q, k, v)
    assert torch.equal(before[:, :, :9], after[:, :, :9])
    assert not torch.allclose(before[:, :, 9:], after[:, :, 9:])


def test_gradients_of_gradients_are_refused() -> None:
    q, k, v = heads(1, 4)
    (gradient,) = torch.autograd.grad(causal_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()
