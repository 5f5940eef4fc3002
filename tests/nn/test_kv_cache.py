"""KVCache: forgetting and overwriting tokens (tests/inference/test_decode.py decodes with it)."""

from __future__ import annotations

import pytest
import torch

from tests.inference.test_decode import BLOCK, lively_model
from utils.inference.decode import make_room, new_cache


@pytest.mark.parametrize("position", ["rope", "learned"])
@torch.inference_mode()
def test_forgotten_tokens_leave_no_trace(position: str) -> None:
    model = lively_model(position=position).double()
    cache = new_cache(model, 2)
    model.hidden(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), cache)
    cache.forget(2)
    assert cache.lengths == cache.positions.tolist() == [2, 2]
    logits = model(torch.tensor([[9, 10], [11, 12]]), cache=cache)[0]
    expected = model(torch.tensor([[1, 2, 9, 10], [5, 6, 11, 12]]))[0][:, 2:]
    torch.testing.assert_close(logits, expected)


@torch.inference_mode()
def test_tokens_that_overwrote_older_ones_cannot_be_forgotten() -> None:
    model = lively_model(position="rope")
    cache = new_cache(model, 1)
    model.hidden(torch.zeros(1, BLOCK, dtype=torch.int64), cache)
    model.hidden(torch.tensor([[1]]), cache)
    with pytest.raises(AssertionError):
        cache.forget(1)


@pytest.mark.parametrize("full", [[0, 2], [0, 1, 2]])
@torch.inference_mode()
def test_make_room_keeps_the_newer_half_of_full_contexts(full: list[int]) -> None:
    model = lively_model(position="learned").double()
    idx = torch.arange(3 * BLOCK).view(3, BLOCK) % 17
    lengths = [BLOCK if row in full else 5 for row in range(3)]
    cache = new_cache(model, 3)
    model.hidden(idx, cache, None if len(full) == 3 else lengths)
    make_room(model, cache)
    assert cache.lengths == cache.positions.tolist() == [BLOCK // 2 if row in full else 5 for row in range(3)]
    logits = model(torch.tensor([[1], [2], [3]]), cache=cache)[0]
    for row, token in enumerate((1, 2, 3)):
        context = idx[row, BLOCK // 2 :] if row in full else idx[row, :5]
        expected = model(torch.tensor([[*context.tolist(), token]]))[0][:, -1]
        torch.testing.assert_close(logits[row], expected)
