"""Attention over short sequences has the values and gradients of PyTorch's operator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from utils.nn import attention as module
from utils.nn.attention import SHORT_TOKENS, ShortAttention, causal_attention, causal_mask


def q_k_v(batch: int, length: int, kv_heads: int = 3, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Queries (B, T, 3, 8), keys and values (B, T, K, 8), as the model cuts them from one product."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, length, 3 + 2 * kv_heads, 8, generator=generator, dtype=dtype).requires_grad_()
    return list(qkv.split((3, kv_heads, kv_heads), dim=2))


def by_torch(*q_k_v: torch.Tensor) -> torch.Tensor:
    heads = (x.transpose(1, 2) for x in q_k_v)
    return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("length", [2, 3, 64, SHORT_TOKENS])
@pytest.mark.parametrize("batch", [1, 4])
def test_short_attention_and_its_gradients_equal_torch(batch: int, length: int) -> None:
    inputs = q_k_v(batch, length)
    upstream = torch.randn(batch, length, 24)
    ours, theirs = ShortAttention.apply(*inputs), by_torch(*inputs)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(y, inputs, upstream, retain_graph=True) for y in (ours, theirs)]
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize(
    ("tensors", "dropout", "ours"),
    [
        (q_k_v(2, SHORT_TOKENS), 0.0, True),
        (q_k_v(2, SHORT_TOKENS + 1), 0.0, False),
        (q_k_v(2, 1), 0.0, False),
        (q_k_v(2, 8, kv_heads=1), 0.0, False),
        (q_k_v(2, 8), 0.5, False),
        (q_k_v(2, 8, dtype=torch.bfloat16), 0.0, False),
    ],
)
def test_every_other_case_is_left_to_torch(
    tensors: list[torch.Tensor], dropout: float, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(module.ShortAttention, "apply", lambda *arguments: asked.append(arguments))
    result = causal_attention(*tensors, dropout)
    assert bool(asked) == ours
    assert ours or result.shape == (2, tensors[0].size(1), 24)
    if not ours and not dropout:
        torch.testing.assert_close(result, by_torch(*tensors))


def test_no_token_sees_a_later_one() -> None:
    tensors = [x.detach().clone() for x in q_k_v(1, 16)]
    before = causal_attention(*tensors)
    for x in tensors:
        x[:, 9:] = 100.0
    after = causal_attention(*tensors)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_second_derivatives_are_refused() -> None:
    q, k, v = q_k_v(1, 4)
    with pytest.raises(RuntimeError, match="ShortAttentionBackward has no second derivative"):
        torch.autograd.grad(causal_attention(q, k, v).sum(), q, create_graph=True)


def test_training_works_after_generation_and_fake_tensors() -> None:
    causal_mask.cache_clear()
    with FakeTensorMode():  # as in the search for a batch size
        assert isinstance(causal_attention(*q_k_v(1, 5)), FakeTensor)
    with torch.inference_mode():
        causal_attention(*q_k_v(1, 5))
    tensors = q_k_v(1, 5)
    gradients = torch.autograd.grad(causal_attention(*tensors).sum(), tensors)
    assert all(gradient.any() for gradient in gradients)
