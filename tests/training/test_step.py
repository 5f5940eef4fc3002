"""A non-finite gradient changes neither weights nor optimizer, on the CPU and on a device, without waiting for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
import utils.training.step
from utils.config.settings import OptimizerConfig
from utils.optim import groups
from utils.runs.run import read_record
from utils.training.state import TrainState, capture
from utils.training.step import clip_gradients, forward_backward, optimizer_step

StateWith = Callable[[str], TrainState]
OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
DEVICES = pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])


class NoReads(TorchDispatchMode):
    """Fails if a number of a tensor is read on the host, which would have to wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def sgd(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """An optimizer that ignores found_inf."""
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9)


@pytest.fixture
def state_with(new_state: Callable[..., TrainState], monkeypatch: pytest.MonkeyPatch) -> StateWith:
    """A state with this optimizer, before its first step."""

    def make(optimizer: str) -> TrainState:
        if optimizer == "sgd":
            monkeypatch.setitem(groups.OPTIMIZERS, "adamw", sgd)
        name = optimizer if optimizer == "muon" else "adamw"
        return new_state("--optimizer-name", name, "--weight-decay", "0.1")

    return make


def update(state: TrainState, device: str = "cpu", *, nan: bool = False) -> None:
    """One update as on this device: except on the CPU, the optimizer must not read a number on the host."""
    forward_backward(state)
    if nan:
        next(state.model.parameters()).grad[0, 0] = torch.nan  # type: ignore[index]
    norms, real = clip_gradients(state), state.device
    state.device = torch.device(device)
    with contextlib.nullcontext() if device == "cpu" else NoReads():
        optimizer_step(state, norms)
    state.device = real


def contents(state: TrainState) -> dict[str, torch.Tensor]:
    weights, optimizer, _ = capture(state)
    return {name: tensor.clone() for name, tensor in (weights | optimizer).items()}


@OPTIMIZERS
@DEVICES
def test_a_nan_gradient_changes_no_weight_and_no_optimizer_state(
    optimizer: str, device: str, state_with: StateWith
) -> None:
    state = state_with(optimizer)
    for _ in range(3):
        update(state, device)
    before = contents(state)
    update(state, device, nan=True)
    after = contents(state)
    assert state.step == 4
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@OPTIMIZERS
@DEVICES
def test_the_first_gradient_may_be_nan(optimizer: str, device: str, state_with: StateWith) -> None:
    state = state_with(optimizer)
    before = {name: p.clone() for name, p in state.model.named_parameters()}
    update(state, device, nan=True)
    assert all(torch.equal(p, before[name]) for name, p in state.model.named_parameters())
    update(state, device)
    assert all(torch.isfinite(tensor).all() for tensor in contents(state).values())


@OPTIMIZERS
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_finite_updates_are_the_same_bits_on_any_device(optimizer: str, device: str, state_with: StateWith) -> None:
    host, other = state_with(optimizer), state_with(optimizer)
    for _ in range(3):
        update(host)
        update(other, device)
    assert all(torch.equal(tensor, contents(other)[name]) for name, tensor in contents(host).items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_with_a_nan_gradient_ends_as_diverged_with_the_weights_before_it(
    optimizer: str,
    tiny_argv: Callable[..., list[str]],
    only_run: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights: dict[int, list[torch.Tensor]] = {}
    gradients, step = utils.training.step.forward_backward, utils.training.step.optimizer_step

    def planted(state: TrainState, phase: Any) -> torch.Tensor:
        loss = gradients(state, phase)
        if state.step == 4:
            next(state.model.parameters()).grad[0, 0] = torch.nan  # type: ignore[index]
        return loss

    def seen(state: TrainState, *norms: torch.Tensor) -> None:
        step(state, *norms)
        weights[state.step] = [p.detach().clone() for p in state.model.parameters()]

    monkeypatch.setattr(utils.training.step, "forward_backward", planted)
    monkeypatch.setattr(utils.training.step, "optimizer_step", seen)
    words = tiny_argv("--optimizer-name", optimizer, "--max-iters", "5", "--eval-interval", "5")
    assert train.main(words) == 1
    record = read_record(only_run())
    assert (record["status"], record["exit_reason"]) == ("diverged", "the gradient norm at step 4 is nan")
    assert all(torch.equal(a, b) for a, b in zip(weights[4], weights[5], strict=True))
