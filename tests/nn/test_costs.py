"""The estimated operations, compared with those that torch counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import LanguageModel, outline
from utils.config.settings import ModelConfig
from utils.inference.decode import prefill
from utils.nn import linear
from utils.nn.costs import MixesTokens, forward_flops, prefill_flops, training_flops

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
def test_the_estimate_of_a_forward_pass_equals_the_count_of_torch(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "ONEDNN", None)  # the counter does not know its operator
    model, idx = LanguageModel(config, vocab_size=11), torch.zeros(3, config.block_size, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(idx)
    T = config.block_size  # the kernel computes all T keys of each query
    assert counter.get_total_flops() == forward_flops(model, tokens=3 * T, context=T)


def test_training_costs_three_forward_passes_over_the_lower_triangle() -> None:
    model, T = LanguageModel(SHAPES[0], 11), SHAPES[0].block_size
    assert training_flops(model, 3, T) == 3 * forward_flops(model, 3 * T, (T + 1) / 2)


@pytest.mark.parametrize("window", [1, 2, 5, 8, 9])
def test_a_sliding_window_saves_the_keys_outside_it(window: int) -> None:
    T, H, D = 8, 2, 16
    settings = {"n_layer": 3, "n_head": H, "n_embd": H * D, "block_size": T, "full_attention_layers": 1}
    full, windowed = (
        outline(ModelConfig(**settings, sliding_window=limit), 11)  # type: ignore[arg-type]
        for limit in (None, window)
    )
    keys = sum(min(place + 1, window) for place in range(T))
    saved = sum(range(1, T + 1)) - keys
    assert forward_flops(full, T, (T + 1) / 2) - forward_flops(windowed, T, (T + 1) / 2) == 2 * 2 * 2 * H * D * saved


@pytest.mark.parametrize("tied", [True, False])
def test_prefill_computes_logits_for_the_last_token_only(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "ONEDNN", None)
    config = SHAPES[0].model_copy(update={"tie_embeddings": tied})
    model, T = LanguageModel(config, vocab_size=1000), 7
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        torch.no_grad(),
    ):
        prefill(model, torch.zeros(1, T, dtype=torch.int64), None)
    upper = forward_flops(model, T, T) - forward_flops(model, T, (T + 1) / 2)  # the kernel computes all T keys
    assert counter.get_total_flops() == prefill_flops(model, T) + upper


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_outline_has_the_shapes_of_the_model_but_no_storage(variant: dict[str, Any]) -> None:
    config = ModelConfig(n_layer=3, n_head=2, n_embd=12, block_size=7, **variant)
    model, random_state = LanguageModel(config, vocab_size=11), torch.get_rng_state()
    shapes = outline(config, vocab_size=11)
    assert [(n, p.shape) for n, p in shapes.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]
    assert all(parameter.is_meta for parameter in shapes.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert training_flops(shapes, 2, 7) == training_flops(model, 2, 7)


def test_an_outline_does_not_import_the_compiler() -> None:
    code = "import sys; from model import outline; from utils.config.settings import ModelConfig as C\n"
    code += "for p in ('learned', 'rope'): outline(C(position=p), 65)\nassert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_layers_of_unknown_classes_count_as_their_matrices() -> None:
    model = LanguageModel(SHAPES[0], 11)
    F, C, L = 4 * 32, 32, 2
    before = forward_flops(model, 1, 0)
    for block in model.blocks:
        block.mlp = torch.nn.Sequential(torch.nn.Linear(C, 10), torch.nn.ReLU(), torch.nn.Linear(10, C))
    assert forward_flops(model, 1, 0) == before - 2 * L * 2 * C * (F - 10)
    assert [isinstance(part, MixesTokens) for part in model.blocks[0].children()] == [False, True, False, False]
