"""Schedules at points worked out by hand, parameter groups, and AdamW against its formula."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from model import LanguageModel
from utils.config.settings import ModelConfig, OptimizerConfig
from utils.optim.groups import build_optimizer
from utils.optim.schedules import (
    apply_schedules,
    learning_rate_at,
    momentum_at,
    scheduled_settings,
    set_learning_rate,
    weight_decay_at,
)


def rate(step: int, max_iters: int = 20, **settings: Any) -> float:
    config = OptimizerConfig(**{"learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 4} | settings)
    return learning_rate_at(step, config, max_iters)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warmup_rises_linearly_from_above_zero(schedule: str) -> None:
    assert [rate(step, schedule=schedule) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        ("cosine", {4: 1.0, 8: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 12: 0.55, 16: 0.1 + 0.45 * (1 - math.sqrt(0.5))}),
        ("linear", {4: 1.0, 8: 0.775, 12: 0.55, 16: 0.325}),
        ("constant", {4: 1.0, 8: 1.0, 12: 1.0, 16: 1.0, 20: 1.0, 1000: 1.0}),
    ],
)
def test_schedules_at_points_worked_out_by_hand(schedule: str, points: dict[int, float]) -> None:
    assert {step: rate(step, schedule=schedule) for step in points} == pytest.approx(points)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_schedule_starts_right_after_warmup_iters_steps(schedule: str) -> None:
    """Bit for bit: the next rate is computed by the schedule, with its rounding, and is not the exact peak."""
    settings = {"schedule": schedule, "learning_rate": 0.9, "min_lr": 0.3}
    assert rate(3, **settings) == 0.9 * 4 / 5
    assert rate(4, **settings) == 0.3 + (0.9 - 0.3) != 0.9


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("step", [20, 21, 1000])
def test_the_decay_ends_at_min_lr_and_stays_there(schedule: str, step: int) -> None:
    assert rate(step, schedule=schedule) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_decay_ends_at_lr_decay_iters(schedule: str) -> None:
    assert rate(8, schedule=schedule, lr_decay_iters=12) == pytest.approx(0.55)
    assert rate(12, schedule=schedule, lr_decay_iters=12) == pytest.approx(0.1)
    assert rate(19, schedule=schedule, lr_decay_iters=12) == pytest.approx(0.1)
    assert rate(20, schedule=schedule, lr_decay_iters=36) == pytest.approx(0.55)


def test_without_min_lr_the_rate_falls_to_a_tenth() -> None:
    assert rate(20, min_lr=None) == pytest.approx(0.1)
    assert rate(20, min_lr=0.0) == pytest.approx(0.0)


def test_without_warmup_iters_a_twentieth_of_the_run_is_warmup() -> None:
    rates = [rate(step, 100, warmup_iters=None) for step in range(7)]
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])
    assert rates[6] < 1.0


def test_without_any_warmup_the_first_rate_is_the_peak() -> None:
    assert rate(0, warmup_iters=0) == 1.0
    assert rate(0, 1, warmup_iters=None) == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_never_rises_after_the_warmup_and_stays_in_its_bounds(schedule: str) -> None:
    rates = [rate(step, 200, schedule=schedule) for step in range(250)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[4:]))
    assert all(0.1 - 1e-12 <= value <= 1.0 for value in rates)


GROUPS = {
    "matrices": ("qkv.weight", "up.weight", "gate.weight", "proj.weight"),
    "embeddings": ("embedding.weight",),
    "head": ("head.weight",),
    "vectors": ("norm.weight", "norm.bias", "qkv.bias", "up.bias", "gate.bias", "proj.bias"),
}
LLAMA = {"norm": "rmsnorm", "mlp": "swiglu", "bias": False, "position": "rope", "tie_embeddings": False}


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
@pytest.mark.parametrize("settings", [{}, LLAMA, {"qk_norm": True, "qkv_bias": False, "mlp": "relu2"}])
def test_every_parameter_is_in_one_group_and_all_but_vectors_decay(
    optimizer_name: str, settings: dict[str, Any]
) -> None:
    model = LanguageModel(ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=4, **settings), 7)
    config = OptimizerConfig(optimizer_name=optimizer_name, weight_decay=0.3)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in build_optimizer(model, config).param_groups:
        assert group["weight_decay"] == (0.0 if group["name"] == "vectors" else 0.3)
        for parameter in group["params"]:
            assert names.pop(id(parameter)).endswith(GROUPS[group["name"]])  # pop finds a parameter once
        assert ("momentum" in group) == (optimizer_name == "muon" and group["name"] == "matrices")
    assert names == {}


def test_muon_splits_queries_keys_and_values() -> None:
    config = ModelConfig(n_layer=1, n_head=4, n_kv_head=2, n_embd=16, block_size=4)
    optimizer = build_optimizer(LanguageModel(config, 7), OptimizerConfig(optimizer_name="muon"))
    matrices = next(group for group in optimizer.param_groups if group["name"] == "matrices")
    rows = {tuple(p.shape): blocks for p, blocks in zip(matrices["params"], matrices["blocks"], strict=True)}
    assert rows == {(32, 16): [16, 8, 8], (16, 16): [16], (64, 16): [64], (16, 64): [16]}


def test_each_group_has_its_own_learning_rate_in_proportion_to_the_schedule() -> None:
    model = LanguageModel(ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=4, tie_embeddings=False), 7)
    config = OptimizerConfig(learning_rate=0.1, embedding_lr=0.4, head_lr=0.05, vector_lr=0.2)
    optimizer = build_optimizer(model, config)
    rates = {"matrices": 0.1, "embeddings": 0.4, "head": 0.05, "vectors": 0.2}
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == pytest.approx(rates)
    set_learning_rate(optimizer, 0.01)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == pytest.approx(
        {name: lr / 10 for name, lr in rates.items()}
    )


def test_schedules_are_applied_to_all_groups() -> None:
    model = LanguageModel(ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=4), 7)
    config = OptimizerConfig(
        optimizer_name="muon",
        learning_rate=0.1,
        min_lr=0.0,
        schedule="linear",
        warmup_iters=0,
        weight_decay=0.2,
        weight_decay_schedule="linear",
        momentum=0.95,
        momentum_warmup_iters=10,
    )
    optimizer = build_optimizer(model, config)
    seen = []
    for step in (0, 5, 10, 15, 20):
        assert apply_schedules(optimizer, step, config, 20) == learning_rate_at(step, config, 20)
        matrices, vectors = optimizer.param_groups[0], optimizer.param_groups[-1]
        assert vectors["weight_decay"] == 0.0
        seen.append((matrices["lr"], matrices["weight_decay"], matrices["momentum"]))
    points = [(0.1, 0.2, 0.85), (0.075, 0.15, 0.9), (0.05, 0.1, 0.95), (0.025, 0.05, 0.95), (0.0, 0.0, 0.95)]
    assert [number for point in seen for number in point] == pytest.approx([n for point in points for n in point])


def test_momentum_never_falls_during_its_warmup() -> None:
    config = OptimizerConfig(momentum=0.6, momentum_warmup_iters=4)
    assert [momentum_at(step, config) for step in range(6)] == pytest.approx([0.6] * 6)


def test_the_weight_decay_is_constant_by_default() -> None:
    assert [weight_decay_at(step, OptimizerConfig(weight_decay=0.1), 10) for step in (0, 9)] == [0.1, 0.1]


def test_adamw_follows_its_formula() -> None:
    config = OptimizerConfig(weight_decay=0.2, beta1=0.8, beta2=0.95, adam_eps=1e-3)
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model, config)
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    m = {name: torch.zeros_like(p) for name, p in expected.items()}
    v = {name: torch.zeros_like(p) for name, p in expected.items()}
    generator = torch.Generator().manual_seed(0)
    for t, lr in enumerate((0.1, 0.05, 0.2, 0.01, 0.1), start=1):
        set_learning_rate(optimizer, lr)
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            gradient = p.grad.double()
            m[name] = 0.8 * m[name] + 0.2 * gradient
            v[name] = 0.95 * v[name] + 0.05 * gradient**2
            expected[name] *= 1 - lr * (0.2 if name == "weight" else 0.0)
            expected[name] -= lr * (m[name] / (1 - 0.8**t)) / ((v[name] / (1 - 0.95**t)).sqrt() + 1e-3)
        optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach().double(), expected[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_loaded_state_is_on_the_device_of_the_parameters(name: str) -> None:
    """This includes the step counts, because fused AdamW needs them there."""
    config = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=4)
    models = [LanguageModel(config, 7) for _ in range(2)]
    optimizers = [build_optimizer(model, OptimizerConfig(optimizer_name=name)) for model in models]
    models[0](torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
    optimizers[0].step()
    models[1].to("meta")
    for group in optimizers[1].param_groups:
        group["params"] = [p.to("meta") for p in group["params"]]
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    tensors = [tensor for state in optimizers[1].state.values() for tensor in state.values()]
    assert tensors
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_scheduled_settings_are_those_that_change_from_step_to_step() -> None:
    def scheduled(**settings: Any) -> tuple[str, ...]:
        return scheduled_settings(OptimizerConfig(**settings))

    assert scheduled(momentum_warmup_iters=0) == ("lr",)
    assert scheduled(momentum_warmup_iters=1) == ("lr", "momentum")
    assert scheduled(momentum_warmup_iters=0, weight_decay_schedule="linear") == ("lr", "weight_decay")
    assert scheduled(momentum_warmup_iters=9, weight_decay_schedule="cosine") == ("lr", "weight_decay", "momentum")


def test_a_decay_of_one_step_ends_after_it() -> None:
    assert rate(5, schedule="linear", lr_decay_iters=5) == pytest.approx(0.1)
    assert [rate(step, schedule="linear", lr_decay_iters=4) for step in (4, 5)] == pytest.approx([1.0, 0.1])


def test_the_weight_decay_stays_zero_after_the_end() -> None:
    config = OptimizerConfig(weight_decay=0.1, weight_decay_schedule="linear")
    assert [weight_decay_at(step, config, 10) for step in (5, 10, 11, 30)] == pytest.approx([0.05, 0, 0, 0])


def test_the_momentum_is_exact_after_its_warmup() -> None:
    config = OptimizerConfig(momentum=0.95, momentum_warmup_iters=10)
    assert [momentum_at(step, config) for step in (10, 11)] == [0.95, 0.95]
