"""The choice of an attention kernel and its reasons, on the CPU, which has FlashAttention except with dropout."""

from __future__ import annotations

import pytest
import torch

from utils.machine import attention_kernels
from utils.machine.attention_kernels import attention_order, fused_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_kernel_is_found_with_the_reasons_against_preferred_ones() -> None:
    name, reasons = fused_attention(CPU, torch.float32, 4, 2, 8, 16, dropout=0.0)
    assert name == "flash"
    assert reasons.startswith("cudnn: ")


def test_without_a_kernel_the_reason_comes_from_torch() -> None:
    before = torch.get_rng_state()
    name, reasons = fused_attention(CPU, torch.float32, 4, 4, 8, 16, dropout=0.1)
    assert name == ""
    assert reasons.endswith("flash: Both fused kernels do not support non-zero dropout.")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("capability", "cudnn", "changed"),
    [((9, 0), 91900, True), ((9, 0), 91500, False), ((9, 0), None, False), ((8, 0), 91900, False)],
)
def test_only_hopper_with_a_new_cudnn_changes_the_order(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cudnn: int | None, changed: bool
) -> None:
    entered = []
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(attention_kernels, "_only", lambda *names: entered.append(names))
    attention_order(CUDA)
    attention_order(CPU)
    expected = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    assert entered == ([expected] if changed else [])


def test_the_order_is_restored() -> None:
    before = torch._C._get_sdp_priority_order()
    with attention_kernels._only("MATH", "FLASH_ATTENTION"):
        assert torch._C._get_sdp_priority_order() != before
    assert torch._C._get_sdp_priority_order() == before
