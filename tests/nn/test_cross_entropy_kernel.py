"""The kernel equals `losses_and_gradient`, on a GPU or, in Triton's interpreter (tests/conftest.py), on the CPU."""

from __future__ import annotations

import pytest
import torch

from utils.nn import cross_entropy_kernel as kernel
from utils.nn.cross_entropy import chunked_cross_entropy, losses_and_gradient
from utils.nn.targets import IGNORED

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of a gradient: half its last bit at 1
UNTOUCHED = 7.0

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter also computes masked columns


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 columns, so that the vocabularies of these tests have several."""
    monkeypatch.setattr(kernel, "GROUPS", 8)
    monkeypatch.setattr(kernel, "WARPS", 1)


def example(vocab_size: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (7, columns), of which those beyond `vocab_size` are UNTOUCHED, and targets (7,), one of them ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.full((7, columns), UNTOUCHED)
    logits[:, :vocab_size] = 8 * torch.randn(7, vocab_size, generator=generator)
    logits[3] += 60 * (torch.arange(columns) < vocab_size)  # exponentials beyond the range of float32
    logits[4, :vocab_size] -= 200
    targets = torch.randint(vocab_size, (7,), generator=generator)
    targets[1], targets[2], targets[5] = IGNORED, vocab_size - 1, 0
    return logits.to(DEVICE, dtype), targets.to(DEVICE)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize(
    ("vocab_size", "columns"),
    [(128, 128), (64, 128), (5, 8), (77, 77), (200, 256), (203, 256)],
    ids=["whole blocks", "one block", "less than a group", "odd", "part of a block", "part of a group"],
)
def test_losses_and_gradient_equal_torch_in_float64(
    dtype: torch.dtype, softcap: float | None, vocab_size: int, columns: int
) -> None:
    logits, targets = example(vocab_size, columns, dtype)
    exact = logits[:, :vocab_size].double()
    expected = losses_and_gradient(exact, targets, softcap)
    losses = kernel.losses_and_gradient(logits[:, :vocab_size], targets, softcap)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[:, :vocab_size].double(), exact, rtol=0, atol=TOLERANCES[dtype])
    assert losses[1] == 0
    assert not logits[1, :vocab_size].any()
    assert (logits[:, vocab_size:] == UNTOUCHED).all()


def test_a_logit_of_minus_infinity_has_no_probability() -> None:
    logits, targets = example(200, 200, torch.float32)
    logits[:, :150] = -torch.inf
    targets[:] = 180
    exact = logits.double()
    expected = losses_and_gradient(exact, targets, None)
    losses = kernel.losses_and_gradient(logits, targets, None)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=1e-6)


def test_a_nan_logit_or_an_invalid_target_gives_a_nan_loss() -> None:
    """An invalid target would otherwise be read from other memory."""
    logits, targets = example(77, 80, torch.float32)
    logits[0, 5], targets[2], targets[3], targets[6] = torch.nan, 77, -1, 1 << 40
    losses = kernel.losses_and_gradient(logits[:, :77], targets, None)
    assert losses.isnan().tolist() == [True, False, True, True, False, False, True]
    assert logits[0, :77].isnan().all()


@pytest.mark.parametrize("vocab_size", [128, 77])
def test_the_chunked_loss_with_the_kernel_equals_that_without(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 16, generator=generator).to(DEVICE) for size in (23, vocab_size))
    hidden.requires_grad_()
    weight.requires_grad_()
    targets = torch.randint(vocab_size, (23,), generator=generator).to(DEVICE)
    results = []
    for by_row in (kernel.losses_and_gradient, losses_and_gradient):
        monkeypatch.setattr("utils.nn.cross_entropy.fastest_loss_kernel", lambda *_, by_row=by_row: by_row)
        loss = chunked_cross_entropy(hidden, weight, targets, 10, 3.0)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    torch.testing.assert_close(*results)
