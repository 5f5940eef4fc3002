"""Linear layers in FP8 have the error of the formats, and change nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import LanguageModel
from utils.config.settings import ModelConfig
from utils.nn.cross_entropy import chunked_cross_entropy
from utils.nn.float8 import GRADIENTS, SCALED_MM, VALUES, float8_linear, rounded, use_float8
from utils.nn.linear import Linear


def multiplies_in_8_bits() -> bool:
    """Whether this release of torch has the 8-bit product for CPUs."""
    a, one = torch.ones(16, 16).to(VALUES), torch.ones(())
    try:
        assert SCALED_MM is not None
        SCALED_MM(a, a.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
    except (AssertionError, RuntimeError):
        return False
    return True


pytestmark = pytest.mark.skipif(not multiplies_in_8_bits(), reason="this torch has no 8-bit product for CPUs")


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.mark.parametrize("dtype", [VALUES, GRADIENTS])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_a_tensor_is_scaled_to_the_largest_number_of_the_format(dtype: torch.dtype, size: float) -> None:
    (x,) = tensors((64, 48), dtype=torch.float32)
    x8, scale = rounded(x * size, dtype)
    assert x8.float().abs().max() == torch.finfo(dtype).max
    assert error(x8.float() * scale, x * size) < torch.finfo(dtype).eps / 2


def test_zeros_stay_zero_and_nonfinite_values_stay_nonfinite() -> None:
    x8, scale = rounded(torch.zeros(4, 4), VALUES)
    assert torch.equal(x8.float() * scale, torch.zeros(4, 4))
    for bad in (torch.inf, torch.nan):
        x8, scale = rounded(torch.tensor([1.0, bad]), GRADIENTS)
        assert not (x8.float() * scale).isfinite().all()


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_product_and_its_gradients_have_the_error_of_the_formats(has_bias: bool) -> None:
    x, weight, bias, upstream = tensors((4, 16, 64), (32, 64), (32,), (4, 16, 32))
    inputs = [x, weight, bias] if has_bias else [x, weight]
    ours, theirs = float8_linear(*inputs), F.linear(*(tensor.double() for tensor in inputs))
    assert ours.dtype == torch.bfloat16
    assert 1e-3 < error(ours, theirs) < 0.05
    gradients = torch.autograd.grad(ours, inputs, upstream)
    expected = torch.autograd.grad(theirs, inputs, upstream.double())
    for mine, reference, tensor in zip(gradients, expected, inputs, strict=True):
        assert mine.dtype == tensor.dtype
        assert mine.shape == tensor.shape
        assert error(mine, reference) < 0.1


def test_under_autocast_gradients_have_the_precision_of_their_tensors() -> None:
    x, weight = tensors((16, 64), (32, 64), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = float8_linear(x, weight)
    assert y.dtype == torch.bfloat16
    of_x, of_weight = torch.autograd.grad(y.float().square().sum(), (x, weight))
    assert of_x.dtype == of_weight.dtype == torch.float32


def test_without_gradients_or_with_too_few_rows_the_product_is_the_usual_one() -> None:
    x, weight = tensors((15, 64), (32, 64))
    assert torch.equal(float8_linear(x, weight), F.linear(x, weight))
    x, weight = tensors((16, 64), (32, 64))
    with torch.no_grad():
        assert torch.equal(float8_linear(x, weight), F.linear(x, weight))


def test_fp8_products_can_be_compiled() -> None:
    x, weight, upstream = tensors((16, 64), (32, 64), (16, 32))
    compiled = torch.compile(float8_linear, backend="aot_eager", fullgraph=True)
    ours, eager = compiled(x, weight), float8_linear(x, weight)
    assert torch.equal(ours, eager)
    for mine, reference in zip(*(torch.autograd.grad(y, (x, weight), upstream) for y in (ours, eager)), strict=True):
        assert torch.equal(mine, reference)


def test_logits_in_8_bits_have_the_error_of_the_format() -> None:
    hidden, weight = tensors((64, 32), (200, 32))
    targets = torch.arange(64)
    loss = chunked_cross_entropy(hidden, weight, targets, 24, fp8=True)
    exact = chunked_cross_entropy(hidden, weight, targets, 24)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    assert loss != exact
    gradients = [torch.autograd.grad(value, (hidden, weight)) for value in (loss, exact)]
    for ours, theirs in zip(*gradients, strict=True):
        assert error(ours, theirs) < 0.15
    with torch.no_grad():
        assert torch.equal(chunked_cross_entropy(hidden, weight, targets, 24, fp8=True), exact.detach())


class Own(nn.Linear):
    """A layer class of the user, which stays in its own precision."""


def test_a_model_in_fp8_has_the_same_parameters_and_learns() -> None:
    config = ModelConfig.model_validate({"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16})
    torch.manual_seed(0)
    model = LanguageModel(config, vocab_size=64)
    own = Own(32, 32)
    model.blocks[1].attention.proj = own
    before = list(model.state_dict())
    idx = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(0))
    expected = model.loss(idx[:, :-1], idx[:, 1:])
    use_float8(model.blocks)
    assert list(model.state_dict()) == before
    in_8_bits = {
        name for name, layer in model.named_modules() if isinstance(layer, Linear) and "multiply" in vars(layer)
    }
    products = ("attention.qkv", "attention.proj", "mlp.up", "mlp.proj")
    all_products = {f"blocks.{layer}.{name}" for layer in (0, 1) for name in products}
    assert in_8_bits == all_products - {"blocks.1.attention.proj"}
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(idx[:, :-1], idx[:, 1:])
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-2)
    assert not torch.equal(loss, expected)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss < expected / 4
