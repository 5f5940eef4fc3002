"""Schedules at points worked out by hand, parameter groups, and AdamW against its formula."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from model import LanguageModel
from utils.config import ModelConfig, OptimizerConfig
from utils.optim import build_optimizer, learning_rate_at, parameter_groups, set_learning_rate


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


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("step", [20, 21, 1000])
def test_the_decay_ends_at_min_lr_and_stays_there(schedule: str, step: int) -> None:
    assert rate(step, schedule=schedule) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_lr_decay_iters_is_where_the_decay_ends(schedule: str) -> None:
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
def test_the_rate_never_rises_after_the_warmup_nor_leaves_its_bounds(schedule: str) -> None:
    rates = [rate(step, 200, schedule=schedule) for step in range(250)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[4:]))
    assert all(0.1 - 1e-12 <= value <= 1.0 for value in rates)


@pytest.mark.parametrize("settings", [{}, {"norm": "rmsnorm", "mlp": "swiglu", "bias": False, "position": "rope"}])
def test_matrices_decay_and_vectors_do_not(settings: dict[str, Any]) -> None:
    model = LanguageModel(ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=4, **settings), 7)
    decayed, plain = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [[names.pop(id(p)) for p in group["params"]] for group in (decayed, plain)]  # type: ignore[attr-defined]
    assert names == {}  # every parameter is in a group, and pop finds it once
    assert all(
        name.endswith(("embedding.weight", "qkv.weight", "up.weight", "gate.weight", "proj.weight"))
        for name in grouped[0]
    )
    assert all("norm" in name or name.endswith(".bias") for name in grouped[1])
    assert grouped[0]
    assert grouped[1]


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


def test_set_learning_rate_sets_it_in_every_group() -> None:
    optimizer = build_optimizer(torch.nn.Linear(2, 2), OptimizerConfig())
    set_learning_rate(optimizer, 0.123)
    assert [group["lr"] for group in optimizer.param_groups] == [0.123, 0.123]
