"""AdamW equals PyTorch's fused AdamW bit for bit, and has the same numbers without the fused kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from utils.optim import adamw
from utils.optim.adamw import AdamW, adamw_update, decay_factor


def train(optimizer_class: Any, steps: int = 4, **settings: Any) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    """Parameters after steps with the same random gradients, and the optimizer."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,), ())]
    group = {"params": params, "lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-9, "weight_decay": 0.1}
    optimizer = optimizer_class([group], **settings)
    for _ in range(steps):
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach() for parameter in params], optimizer


def test_updates_and_state_equal_those_of_torch_bit_for_bit() -> None:
    ours, mine = train(AdamW)
    theirs, reference = train(torch.optim.AdamW, fused=True)
    assert all(map(torch.equal, ours, theirs))
    for state, expected in zip(mine.state.values(), reference.state.values(), strict=True):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_without_the_fused_kernel_the_public_function_of_torch_computes_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fused, _ = train(AdamW)
    monkeypatch.setattr(adamw, "FUSED_ADAMW", None)
    public, optimizer = train(AdamW)
    for mine, theirs in zip(public, fused, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert [state["step"].item() for state in optimizer.state.values()] == [4, 4, 4]


@pytest.mark.parametrize("fused", [True, False])
def test_with_found_inf_a_step_changes_nothing(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused:
        monkeypatch.setattr(adamw, "FUSED_ADAMW", None)
    params, optimizer = train(AdamW)
    before = [parameter.clone() for parameter in params]
    state = {key: value.clone() for entry in optimizer.state.values() for key, value in entry.items()}
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(map(torch.equal, params, before))
    assert all(torch.equal(value, state[key]) for key, value in list(optimizer.state.values())[-1].items())


def test_gradients_are_never_filled_with_zeros() -> None:
    _, optimizer = train(AdamW)
    optimizer.zero_grad()
    assert all(parameter.grad is None for group in optimizer.param_groups for parameter in group["params"])
    with pytest.raises(ValueError, match="never filled with zeros"):
        optimizer.zero_grad(set_to_none=False)


def test_weight_decay_is_skipped_if_gradients_are_not_finite() -> None:
    group = {"lr": 0.5, "weight_decay": 0.1}
    assert decay_factor(group, None) == 0.95
    assert decay_factor(group, torch.tensor(True)).item() == pytest.approx(0.95)
    assert decay_factor(group, torch.tensor(False)).item() == 1.0


@pytest.mark.parametrize("fused", [True, False])
def test_with_finite_gradients_found_inf_changes_nothing(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused:
        monkeypatch.setattr(adamw, "FUSED_ADAMW", None)
    expected, reference = train(AdamW)
    monkeypatch.setattr(AdamW, "found_inf", torch.zeros(()))
    found, optimizer = train(AdamW)
    assert all(map(torch.equal, found, expected))
    for state, other in zip(optimizer.state.values(), reference.state.values(), strict=True):
        assert all(torch.equal(state[key], other[key]) for key in other)


@pytest.mark.parametrize("finite", [None, True, False])
def test_a_weight_decay_on_the_device_decays_like_a_number(finite: bool | None) -> None:
    """Recorded steps have one. The kernel takes only a number, so the parameters are multiplied before it."""
    start, gradient = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.25])
    found_inf = None if finite is None else torch.tensor(0.0 if finite else 1.0)
    results = []
    for decay in (0.1, torch.tensor(0.1)):
        parameter = torch.nn.Parameter(start.clone())
        parameter.grad = gradient.clone()
        group = {"params": [parameter], "lr": 0.5, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": decay}
        states: dict[torch.Tensor, dict[str, torch.Tensor]] = {parameter: {}}
        with torch.no_grad():
            adamw_update(group, states, found_inf)
        results.append((parameter.detach(), states[parameter]["step"]))
    (number, step), (tensor, same_step) = results
    torch.testing.assert_close(tensor, number)
    assert step == same_step == (0 if finite is False else 1)
    assert torch.equal(tensor, start) == (finite is False)


class OnDevice(torch.Tensor):
    """A tensor that claims to be on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def test_scheduled_settings_are_read_from_the_device_and_others_from_the_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    params = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))]
    settings = {"lr": 0.5, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
    optimizer = AdamW([{"params": [p], **settings} for p in params])
    assert [*optimizer.settings()] == optimizer.param_groups  # on a CPU there is nothing to publish

    optimizer = AdamW([{"params": [p], **settings} for p in params])
    optimizer.scheduled = ("lr", "weight_decay", "momentum")
    optimizer.param_groups[0]["params"] = [params[0].detach().as_subclass(OnDevice)]
    first, second = optimizer.settings()
    assert second == optimizer.param_groups[1]
    assert {name for name, value in first.items() if isinstance(value, torch.Tensor)} == {"lr", "weight_decay"}
    assert (first["lr"].shape, first["lr"].item(), first["betas"]) == ((), 0.5, (0.9, 0.99))
    optimizer.param_groups[0]["lr"] = 0.25
    again, _ = optimizer.settings()
    assert again["lr"] is first["lr"]  # a recorded step reads this place
    assert again["lr"].item() == 0.25
    assert optimizer.param_groups[0]["lr"] == 0.25
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    optimizer.param_groups[0]["lr"] = 0.125
    assert next(optimizer.settings())["lr"].item() == 0.25  # nothing is copied during the capture
    optimizer.publish()
    assert first["lr"].item() == 0.125


def test_neither_an_optimizer_nor_its_saved_state_imports_the_compiler() -> None:
    """The classes of torch import it in both cases, which takes a second at each start and each resume."""
    code = (
        "import sys, torch; from utils.optim.adamw import AdamW\n"
        "weight = torch.nn.Parameter(torch.ones(2, 2)); weight.grad = torch.ones(2, 2)\n"
        "optimizer = AdamW([{'params': [weight], 'lr': 0.1, 'betas': (0.9, 0.9), 'eps': 1e-8, 'weight_decay': 0.0}])\n"
        "optimizer.step()\n"
        "groups = [{**group, 'params': [0]} for group in optimizer.param_groups]\n"
        "optimizer.load_state_dict({'state': {}, 'param_groups': groups})\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
