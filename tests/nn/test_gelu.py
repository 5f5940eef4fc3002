"""GPT-2's GELU computed with a sigmoid has the values and derivatives of PyTorch's operator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from utils.nn import gelu
from utils.nn.gelu import FEW_ELEMENTS, SigmoidGELU, gelu_tanh


@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gelu, "FEW_ELEMENTS", 0)


def test_values_and_derivatives_equal_torch() -> None:
    x = torch.cat((torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -40.0, -0.0, 40.0, 1e4])))
    mine, reference = x.clone().requires_grad_(), x.double().requires_grad_()
    ours, theirs = gelu_tanh(mine), F.gelu(reference, approximate="tanh")
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=1e-6)
    upstream = torch.linspace(-1, 1, len(x))
    ours.backward(upstream)
    theirs.backward(upstream.double())
    assert mine.grad is not None
    assert reference.grad is not None
    torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=2e-6, atol=1e-6)


def test_nan_stays_nan() -> None:
    assert gelu_tanh(torch.tensor([float("nan")])).isnan().all()


def test_without_gradients_the_values_are_the_same() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    with_gradients = gelu_tanh(x.clone().requires_grad_())
    assert torch.equal(gelu_tanh(x), with_gradients.detach())
    assert with_gradients.grad_fn is not None


def test_the_input_is_not_changed() -> None:
    x = torch.randn(10)
    before = x.clone()
    gelu_tanh(x.requires_grad_()).sum().backward()
    assert torch.equal(x, before)


def test_small_tensors_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(SigmoidGELU, "apply", None)
    x = torch.randn(FEW_ELEMENTS)
    assert torch.equal(gelu_tanh(x), F.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_left_to_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SigmoidGELU, "apply", None)
    x = torch.randn(10, dtype=dtype)
    assert torch.equal(gelu_tanh(x), F.gelu(x, approximate="tanh"))


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(10).requires_grad_()
    with pytest.raises(RuntimeError, match="SigmoidGELUBackward has no second derivative"):
        torch.autograd.grad(gelu_tanh(x).sum(), x, create_graph=True)
