"""Captured graphs: without CUDA the function itself, with CUDA the same numbers."""

from __future__ import annotations

import pytest
import torch

from utils.machine.graphs import capture_graph


def test_without_cuda_the_function_is_returned() -> None:
    def work() -> int:
        return 3

    assert capture_graph(work, torch.device("cpu")) is work


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("index", range(max(torch.cuda.device_count(), 1)))
def test_a_capture_computes_nothing_and_each_replay_repeats_the_work(index: int) -> None:
    device = torch.device("cuda", index)
    total = torch.zeros(3, device=device)
    repeat = capture_graph(lambda: total.add_(1), device)
    assert total.tolist() == [0, 0, 0]
    for _ in range(2):
        result = repeat()
    assert result is total
    assert total.tolist() == [2, 2, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_after_a_failed_capture_the_device_works_as_before() -> None:
    device = torch.device("cuda", 0)
    total, before = torch.zeros(3, device=device), torch.cuda.current_stream(device)
    earlier = capture_graph(lambda: total.add_(1), device)
    with pytest.raises(RuntimeError):
        capture_graph(lambda: total.sum().item(), device)
    assert torch.cuda.current_stream(device) == before
    torch.cuda.empty_cache()
    assert torch.nn.functional.dropout(total, 0.5).shape == (3,)
    earlier()
    capture_graph(lambda: total.add_(1), device)()
    assert total.tolist() == [2, 2, 2]
