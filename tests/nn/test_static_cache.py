"""StaticCache: passes that read no number on the host, compared with one pass over the whole sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.inference.test_decode import BLOCK, VOCAB, lively_model
from utils.nn.static_cache import StaticCache

VARIANTS: dict[str, dict[str, Any]] = {
    "learned": {"position": "learned"},
    "rope, grouped": {"position": "rope", "n_kv_head": 2},
    "rope, one key head, n-grams": {"position": "rope", "n_kv_head": 1, "ngram_rows": (7, 5)},
    "window, learned qk norm": {"position": "rope", "sliding_window": 3, "qk_norm": True, "qk_norm_weights": True},
    "window of one block": {"position": "learned", "n_kv_head": 2, "sliding_window": 4, "full_attention_layers": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [1, 2, 3])
@torch.inference_mode()
def test_passes_over_a_few_tokens_give_the_logits_of_the_whole_sequence(variant: str, length: int) -> None:
    model = lively_model(**VARIANTS[variant]).double()
    idx = torch.randint(VOCAB, (2, BLOCK), generator=torch.Generator().manual_seed(1))
    expected = model(idx)[0]
    cache = StaticCache(model.config, 2, BLOCK, idx.device, torch.float64)
    model.hidden(idx[:, :2], cache)
    for first in range(2, BLOCK - length + 1, length):
        with cache.static_pass(min(first + length + 1, BLOCK)):
            logits = model(idx[:, first : first + length], cache=cache)[0]
        cache.count(length)
        torch.testing.assert_close(logits, expected[:, first : first + length])
        assert cache.positions.tolist() == cache.lengths == [first + length] * 2


@torch.inference_mode()
def test_sequences_may_differ_in_length() -> None:
    model = lively_model(position="rope").double()
    idx = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
    cache = StaticCache(model.config, 2, BLOCK, idx.device, torch.float64)
    model.hidden(idx, cache, [5, 3])
    with cache.static_pass(BLOCK):
        logits = model(torch.tensor([[9], [10]]), cache=cache)[0]
    cache.count(1)
    torch.testing.assert_close(logits[0], model(torch.tensor([[1, 2, 3, 4, 5, 9]]))[0][0, -1:])
    torch.testing.assert_close(logits[1], model(torch.tensor([[6, 7, 8, 10]]))[0][0, -1:])
    assert cache.positions.tolist() == cache.lengths == [6, 4]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_forgotten_tokens_leave_no_trace(variant: str) -> None:
    model = lively_model(**VARIANTS[variant]).double()
    cache = StaticCache(model.config, 1, BLOCK, torch.device("cpu"), torch.float64)
    model.hidden(torch.tensor([[1, 2, 3]]), cache)
    with cache.static_pass(BLOCK):
        model.hidden(torch.tensor([[4, 5, 6]]), cache)
    cache.count(3)
    cache.forget(2)
    assert cache.positions.tolist() == cache.lengths == [4]
    with cache.static_pass(BLOCK):
        logits = model(torch.tensor([[7]]), cache=cache)[0]
    torch.testing.assert_close(logits[:, -1], model(torch.tensor([[1, 2, 3, 4, 7]]))[0][:, -1])
