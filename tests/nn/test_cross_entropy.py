"""The loss in chunks has the value and the gradients of torch's cross-entropy, and never holds all logits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_module
from model import LanguageModel
from utils.config.settings import ModelConfig
from utils.nn.cross_entropy import (
    CHUNK_LOGITS,
    IGNORED,
    SMALL_VOCABULARY,
    chunked_cross_entropy,
    fastest_loss_kernel,
    kernel_on,
    losses_and_gradient,
    rows_at_once,
)

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def example(rows: int, channels: int, vocab_size: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """hidden (rows, channels), weight (vocab_size, channels) and targets (rows,), of which the first is ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(size, channels, generator=generator, dtype=torch.float64) for size in (rows, vocab_size)
    )
    targets = torch.randint(vocab_size, (rows,), generator=generator)
    targets[0] = IGNORED
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None = None
) -> torch.Tensor:
    logits = hidden @ weight.t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("rows", [5, 12, 23, 100])  # 23 rows: chunks of 5 leave 3, and 12 leave 11
@pytest.mark.parametrize("vocab_size", [128, 77, 300])
def test_loss_and_gradients_equal_torch(dtype: torch.dtype, softcap: float | None, rows: int, vocab_size: int) -> None:
    hidden, weight, targets = example(23, 16, vocab_size, dtype)
    loss = chunked_cross_entropy(hidden, weight, targets, rows, softcap)
    gradients = torch.autograd.grad(loss * 3, (hidden, weight))
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = reference(*exact, targets, softcap)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert [gradient.dtype for gradient in gradients] == [dtype, dtype]
    tolerance = TOLERANCES[dtype]
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected * 3, exact), strict=True):
        assert error(ours, theirs) < tolerance


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_are_the_derivatives_of_the_loss(softcap: float | None) -> None:
    hidden, weight, targets = example(7, 4, 9)
    assert torch.autograd.gradcheck(lambda h, w: chunked_cross_entropy(h, w, targets, 3, softcap), (hidden, weight))


def test_under_autocast_float32_parameters_have_float32_gradients() -> None:
    hidden, weight, targets = example(64, 32, 200, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, targets, 16)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    expected = torch.autograd.grad(reference(hidden.double(), weight.double(), targets), (hidden, weight))
    for ours, theirs in zip(gradients, expected, strict=True):
        assert ours.dtype == torch.float32
        assert 1e-5 < error(ours, theirs.double()) < 2e-2


def test_tiny_gradients_survive_float16() -> None:
    """They would round to zero if they were divided by the number of rows before the loss is scaled."""
    hidden, weight, targets = example(16, 32, 200, torch.float16)
    copies = 4096
    loss = chunked_cross_entropy(hidden.repeat(copies, 1) / 64, weight, targets.repeat(copies), 1 << 14)
    (ours,) = torch.autograd.grad(loss * 2**16, hidden)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    (theirs,) = torch.autograd.grad(reference(exact[0] / 64, exact[1], targets), exact[0])
    assert error(ours.double() / 2**16, theirs) < 2e-2


def test_without_gradients_the_loss_is_the_same() -> None:
    hidden, weight, targets = example(23, 16, 77, torch.float32)
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, targets, 5)
    assert not loss.requires_grad
    assert torch.equal(loss, chunked_cross_entropy(hidden, weight, targets, 5).detach())


def test_without_gradients_the_loss_is_also_the_same_under_autocast() -> None:
    hidden, weight, targets = example(64, 32, 200, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, targets, 16).detach()
        with torch.no_grad():
            assert torch.equal(chunked_cross_entropy(hidden, weight, targets, 16), loss)


def test_a_frozen_weight_or_input_does_not_change_the_other_gradient() -> None:
    hidden, weight, targets = example(8, 4, 9)
    chunked_cross_entropy(hidden, weight.detach(), targets, 3).backward()
    expected = hidden.grad
    hidden.grad = None
    chunked_cross_entropy(hidden, weight, targets, 3).backward()
    assert expected is not None
    assert torch.equal(hidden.grad, expected)
    weight.grad = None
    chunked_cross_entropy(hidden.detach(), weight, targets, 3).backward()
    assert weight.grad is not None


def test_second_derivatives_are_refused() -> None:
    hidden, weight, targets = example(8, 4, 9)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(chunked_cross_entropy(hidden, weight, targets, 3), hidden, create_graph=True)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_no_tensor_is_larger_than_a_chunk_of_logits(softcap: float | None) -> None:
    hidden, weight, targets = example(512, 8, 256, torch.float32)
    with LargestTensor() as largest:
        chunked_cross_entropy(hidden, weight, targets, 64, softcap).backward()
    assert largest.elements == 64 * 256
    with LargestTensor() as largest:
        reference(hidden, weight, targets, softcap).backward()
    assert largest.elements == 512 * 256


def test_the_chunked_loss_can_be_compiled() -> None:
    hidden, weight, targets = example(23, 16, 77, torch.float32)
    compiled = torch.compile(chunked_cross_entropy, backend="aot_eager")
    loss = compiled(hidden, weight, targets, 5)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    expected = chunked_cross_entropy(hidden, weight, targets, 5)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (hidden, weight)))


def test_only_a_large_vocabulary_on_a_gpu_is_chunked() -> None:
    gpu = torch.device("cuda")
    assert rows_at_once(gpu, 1 << 20, SMALL_VOCABULARY - 1) == 0
    assert rows_at_once(gpu, 8, SMALL_VOCABULARY) == 8
    assert rows_at_once(gpu, 65536, 50304) == 16384
    assert rows_at_once(gpu, 3, CHUNK_LOGITS) == 1
    assert rows_at_once(torch.device("cpu"), 65536, 50304) == 0


# ----------------------------------------------------------------------------------------------- the kernel

KERNEL = "utils.nn.cross_entropy_kernel"


@pytest.fixture
def no_kernel_yet() -> Iterator[None]:
    """Forgets whether the kernel works, before and after the test."""
    kernel_on.cache_clear()
    yield
    kernel_on.cache_clear()


@pytest.mark.usefixtures("no_kernel_yet")
def test_a_gpu_uses_the_kernel_except_in_float64_and_under_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, KERNEL, SimpleNamespace(losses_and_gradient=reversed_losses))
    monkeypatch.setattr(torch, "zeros", lambda *size, device, dtype=None: torch.ones(size, dtype=dtype))
    gpu = torch.device("cuda")
    assert fastest_loss_kernel(gpu, torch.bfloat16, 200, None) is reversed_losses
    assert fastest_loss_kernel(gpu, torch.float32, 200, None) is reversed_losses
    assert fastest_loss_kernel(gpu, torch.float64, 200, None) is losses_and_gradient
    assert fastest_loss_kernel(torch.device("cpu"), torch.float32, 200, None) is losses_and_gradient
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert fastest_loss_kernel(gpu, torch.bfloat16, 200, None) is losses_and_gradient


@pytest.mark.usefixtures("no_kernel_yet")
def test_the_trial_of_the_kernel_compiles_what_the_loss_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()  # width, stride, types and cap, which decide what is compiled

    def kernel(logits: torch.Tensor, targets: torch.Tensor, softcap: float | None) -> torch.Tensor:
        seen.add((logits.size(1), logits.stride(), logits.dtype, targets.dtype, softcap))
        return losses_and_gradient(logits, targets, softcap)

    monkeypatch.setitem(sys.modules, KERNEL, SimpleNamespace(losses_and_gradient=kernel))
    monkeypatch.setattr(
        "utils.nn.cross_entropy.fastest_loss_kernel", lambda *arguments: kernel_on(*arguments) or losses_and_gradient
    )
    hidden, weight, targets = example(23, 16, 77, torch.float32)
    chunked_cross_entropy(hidden, weight, targets, 5, softcap=15.0)
    assert seen == {(77, (128, 1), torch.float32, torch.int64, 15.0)}


def reversed_losses(logits: torch.Tensor, targets: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return -losses_and_gradient(logits, targets, softcap)


@pytest.mark.usefixtures("no_kernel_yet")
def test_without_triton_torch_computes_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, KERNEL, raising=False)
    monkeypatch.delattr("utils.nn.cross_entropy_kernel", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert fastest_loss_kernel(torch.device("cuda"), torch.bfloat16, 200, None) is losses_and_gradient


@pytest.mark.usefixtures("no_kernel_yet")
def test_if_triton_cannot_compile_torch_computes_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setitem(sys.modules, KERNEL, SimpleNamespace(losses_and_gradient=fails))
    with pytest.warns(RuntimeWarning, match="RuntimeError: Failed to find C compiler"):
        assert kernel_on(torch.device("cpu"), torch.float32, 200, None) is None
    assert kernel_on(torch.device("cpu"), torch.float32, 200, None) is None  # warns only once


def test_the_loss_is_computed_with_the_fastest_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = example(23, 16, 77, torch.float32)
    expected = chunked_cross_entropy(hidden, weight, targets, 5)
    monkeypatch.setattr("utils.nn.cross_entropy.fastest_loss_kernel", lambda *_: reversed_losses)
    assert torch.equal(chunked_cross_entropy(hidden, weight, targets, 5), -expected)


# ------------------------------------------------------------------------------------------------ the model


def tiny_model(**settings: Any) -> LanguageModel:
    config = ModelConfig.model_validate({"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, **settings})
    torch.manual_seed(0)
    return LanguageModel(config, vocab_size=77)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(77, (3, 9), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def gradients_of(model: LanguageModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of ten rows, as on CUDA with a large vocabulary."""
    monkeypatch.setattr(model_module, "rows_at_once", lambda _device, _rows, _vocab_size: 10)


SETTINGS = [{}, {"tie_embeddings": False}, {"logit_softcap": 4.0}, {"tie_embeddings": False, "logit_softcap": 4.0}]


@pytest.mark.parametrize("settings", SETTINGS)
def test_on_the_cpu_the_loss_of_the_model_equals_that_of_forward_bit_for_bit(settings: dict[str, Any]) -> None:
    model = tiny_model(**settings)
    loss, expected = model.loss(*batch()), model(*batch())[1]
    assert expected is not None
    assert torch.equal(loss, expected)
    ours, theirs = gradients_of(model, loss), gradients_of(model, expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("settings", SETTINGS)
def test_in_chunks_the_model_has_the_same_loss_and_gradients(settings: dict[str, Any]) -> None:
    model = tiny_model(**settings)
    loss, expected = model.loss(*batch()), model(*batch())[1]
    assert expected is not None
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients_of(model, loss), gradients_of(model, expected))


@pytest.mark.usefixtures("chunks")
def test_a_custom_head_or_forward_or_hook_is_called() -> None:
    class Halved(LanguageModel):
        def head_logits(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().head_logits(hidden) / 2

    class Doubled(LanguageModel):
        def forward(self, *arguments: Any) -> Any:
            logits, loss = super().forward(*arguments)
            return logits, loss * 2

    calls = []
    hooked = tiny_model()
    hooked.register_forward_hook(lambda *_: calls.append("model"))
    hooked_head = tiny_model(tie_embeddings=False)
    assert hooked_head.head is not None
    hooked_head.head.register_forward_hook(lambda *_: calls.append("head"))
    sequential = tiny_model(tie_embeddings=False)
    assert sequential.head is not None
    sequential.head = torch.nn.Sequential(sequential.head, torch.nn.Tanh())
    config = tiny_model().config
    for model in (hooked, hooked_head, sequential, Halved(config, 77), Doubled(config, 77)):
        assert torch.equal(model.loss(*batch()), model(*batch())[1])
    assert calls == ["model", "model", "head", "head"]
