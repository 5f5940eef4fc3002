"""Linear layers computed by oneDNN have the values and gradients of PyTorch's operator."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from utils.nn import linear as module
from utils.nn.linear import ONEDNN, Linear, OneDNNLinear, linear


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.fixture(autouse=True)
def small_products_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALL_PRODUCT", 0)
    monkeypatch.setattr(module, "ONEDNN_IS_FASTER", True)  # on every processor


def test_this_build_of_torch_has_onednn() -> None:
    assert ONEDNN is not None


@pytest.mark.parametrize("shape", [(4, 9, 8), (5, 8), (1, 1, 8), (8,)])
@pytest.mark.parametrize("outputs", [3, 8, 24])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_product_and_its_gradients_equal_torch(shape: tuple[int, ...], outputs: int, has_bias: bool) -> None:
    x, weight, bias, upstream = tensors(shape, (outputs, 8), (outputs,), (*shape[:-1], outputs))
    inputs = [x, weight, bias] if has_bias else [x, weight]
    ours, theirs = linear(*inputs), F.linear(*inputs)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(y, inputs, upstream.detach()) for y in (ours, theirs)]
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference)
        assert mine.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_an_empty_input_gives_an_empty_output(shape: tuple[int, ...]) -> None:
    (weight,) = tensors((3, 8))
    assert linear(torch.zeros(shape), weight).shape == (*shape[:-1], 3)


def test_mismatched_shapes_raise_the_error_of_torch() -> None:
    x, weight = tensors((4, 7), (3, 8))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x, weight)


def test_a_transposed_input_is_accepted() -> None:
    x, weight = tensors((8, 5), (3, 8))
    torch.testing.assert_close(linear(x.t(), weight), F.linear(x.t(), weight))


def test_only_the_needed_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = tensors((4, 8), (3, 8))
    products = []
    original = module.product

    def counted(*arguments: torch.Tensor) -> torch.Tensor:
        products.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(module, "product", counted)
    linear(x.detach(), weight).sum().backward()
    assert len(products) == 2  # the output, and the gradient of the weight
    assert x.grad is None


def test_other_precisions_and_autocast_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("not for oneDNN")

    monkeypatch.setattr(OneDNNLinear, "apply", fail)
    layer = Linear(8, 3)
    x = torch.ones(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.double()(x.double()).dtype == torch.float64
    with pytest.raises(AssertionError, match="not for oneDNN"):
        layer.float()(x)


@pytest.mark.parametrize(("name", "value"), [("ONEDNN", None), ("ONEDNN_IS_FASTER", False)])
def test_without_onednn_or_if_it_is_slower_torch_computes(
    name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = tensors((4, 8), (3, 8), (3,))
    monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "product", None)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


def test_a_product_repeats_bit_for_bit() -> None:
    x, weight, upstream = tensors((64, 96), (33, 96), (64, 33))
    results = []
    for _ in range(3):
        y = linear(x.detach().clone().requires_grad_(), weight)
        (gradient,) = torch.autograd.grad(y, weight, upstream.detach())
        results.append((y, gradient))
    for (y1, g1), (y2, g2) in itertools.pairwise(results):
        assert torch.equal(y1, y2)
        assert torch.equal(g1, g2)


def test_small_products_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = tensors((4, 8), (3, 8))
    for small, name in ((4 * 8 * 3, "LinearBackward"), (4 * 8 * 3 - 1, "OneDNNLinearBackward")):
        monkeypatch.setattr(module, "SMALL_PRODUCT", small)
        y = linear(x, weight)
        assert y.grad_fn is not None
        assert (name == "OneDNNLinearBackward") == (y.grad_fn.name() == name)


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(3, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="OneDNNLinearBackward has no second derivative"):
        torch.autograd.grad(linear(x, torch.randn(5, 4)).sum(), x, create_graph=True)
