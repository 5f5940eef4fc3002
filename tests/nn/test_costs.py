"""The counted operations against those that torch sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import LanguageModel
from utils.config.settings import ModelConfig
from utils.nn import linear
from utils.nn.costs import forward_flops, parameter_count, training_flops

VARIANTS = [
    {},
    {"bias": False, "qkv_bias": True, "position": "rope", "tie_embeddings": False},
    {"norm": "rmsnorm", "mlp": "swiglu", "n_kv_head": 1, "head_dim": 6},
    {"qkv_bias": False, "ffn_dim": 5, "mlp": "relu2", "qk_norm": True, "ngram_rows": (9, 4)},
]
SHAPES = [
    ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16),
    ModelConfig(n_layer=1, n_head=4, n_kv_head=2, n_embd=64, block_size=8, mlp="swiglu", position="rope"),
    ModelConfig(n_layer=1, n_head=2, head_dim=8, ffn_dim=24, n_embd=32, block_size=8),
]


@pytest.mark.parametrize("config", SHAPES)
def test_a_forward_pass_is_what_torch_counts(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "ONEDNN", None)  # whose operator the counter does not know
    model, idx = LanguageModel(config, vocab_size=11), torch.zeros(3, config.block_size, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(idx)
    T = config.block_size  # the kernel computes all T keys of each query
    assert counter.get_total_flops() == forward_flops(config, 11, tokens=3 * T, context=T)


def test_training_costs_three_forward_passes_over_the_lower_triangle() -> None:
    config = SHAPES[0]
    T = config.block_size
    assert training_flops(config, 11, 3) == 3 * forward_flops(config, 11, 3 * T, (T + 1) / 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_of_the_model(variant: dict[str, Any]) -> None:
    config = ModelConfig(n_layer=3, n_head=2, n_embd=12, block_size=7, **variant)
    assert parameter_count(config, 11) == LanguageModel(config, vocab_size=11).num_parameters()
