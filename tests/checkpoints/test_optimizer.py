"""The state of an optimizer is restored from a checkpoint bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from some_tensors import same
from torch import nn

from utils.checkpoints.files import Checkpoint, read_checkpoint, write_checkpoint
from utils.checkpoints.folder import (
    OPTIMIZER_FILE,
    CheckpointError,
)
from utils.checkpoints.optimizer import flatten_optimizer, restore_optimizer

TOKENIZER = {"type": "char", "version": 1, "vocabulary": ["\n", "ü", "🙂"], "unknown_token": None}


class FullPrecisionMomentum(torch.optim.Optimizer):
    """Momentum with float32 state and a float32 master copy, whatever the type of the weights."""

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, {"lr": lr, "name": "all"})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["master"], state["momentum"] = p.float(), torch.zeros_like(p, dtype=torch.float32)
                    state["signs"] = torch.zeros_like(p, dtype=torch.int8)
                state["momentum"].mul_(0.9).add_(p.grad.float())
                state["signs"] += p.grad.sign().to(torch.int8)
                state["master"].sub_(group["lr"] * (state["momentum"] + 0.01 * state["signs"]))
                p.copy_(state["master"])
        return loss


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW fused": lambda m: torch.optim.AdamW(groups_of(m), lr=0.01, betas=(0.8, 0.95), fused=True),
    "AdamW one by one": lambda m: torch.optim.AdamW(groups_of(m), lr=0.01, foreach=False),
    "Adam amsgrad": lambda m: torch.optim.Adam(groups_of(m), lr=0.01, amsgrad=True),
    "Adam with a tensor as rate": lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.01), foreach=False),
    "Adamax": lambda m: torch.optim.Adamax(groups_of(m), lr=0.01),
    "NAdam": lambda m: torch.optim.NAdam(groups_of(m), lr=0.01),
    "RAdam": lambda m: torch.optim.RAdam(groups_of(m), lr=0.01),
    "SGD": lambda m: torch.optim.SGD(groups_of(m), lr=0.1),
    "SGD momentum": lambda m: torch.optim.SGD(groups_of(m), lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop centered": lambda m: torch.optim.RMSprop(groups_of(m), lr=0.01, momentum=0.9, centered=True),
    "Rprop": lambda m: torch.optim.Rprop(groups_of(m), lr=0.01),
    "ASGD": lambda m: torch.optim.ASGD(groups_of(m), lr=0.1, t0=2),
    "Adagrad": lambda m: torch.optim.Adagrad(groups_of(m), lr=0.1),
    "Adadelta": lambda m: torch.optim.Adadelta(groups_of(m), lr=1.0),
    "Adafactor": lambda m: torch.optim.Adafactor(groups_of(m), lr=0.1),
    "Muon": lambda m: torch.optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=0.01),
    "LBFGS": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=2, history_size=3),
    "LBFGS with a line search": lambda m: torch.optim.LBFGS(m.parameters(), max_iter=3, line_search_fn="strong_wolfe"),
    "float32 state": lambda m: FullPrecisionMomentum(groups_of(m), lr=0.01),
}


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, vectors first, so that the order differs from that of the model."""
    parameters = list(model.parameters())
    return [{"params": [p for p in parameters if p.dim() < 2]}, {"params": [p for p in parameters if p.dim() == 2]}]


def small_model(dtype: torch.dtype, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Make the update of `step`, whose data and learning rate are functions of the step."""
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    inputs, targets = torch.randn(8, 4, generator=generator).to(dtype), torch.randn(8, 3, generator=generator).to(dtype)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        return loss

    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(0.01 / (step + 1))
        else:
            group["lr"] *= 0.9
    optimizer.step(closure)


def through_disk(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Checkpoint:
    tensors, structure = flatten_optimizer(model, optimizer)
    write_checkpoint(path, model.state_dict(), tensors, TOKENIZER, {"step": 3, "optimizer": structure})
    return read_checkpoint(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_continues_bit_for_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model = small_model(dtype)
    optimizer = OPTIMIZERS[name](model)
    for step in range(3):
        update(model, optimizer, step)
    checkpoint = through_disk(tmp_path / "step_000003", model, optimizer)
    assert json.loads(json.dumps(checkpoint.state["optimizer"])) == flatten_optimizer(model, optimizer)[1]

    resumed = small_model(dtype, seed=1)
    again = OPTIMIZERS[name](resumed)
    resumed.load_state_dict(checkpoint.weights)
    restore_optimizer(resumed, again, checkpoint.optimizer_tensors, checkpoint.state["optimizer"])
    assert same(flatten_optimizer(resumed, again)[0], flatten_optimizer(model, optimizer)[0])
    assert flatten_optimizer(resumed, again)[1] == flatten_optimizer(model, optimizer)[1]
    for step in range(3, 7):
        update(model, optimizer, step)
        update(resumed, again, step)
    assert same(resumed.state_dict(), model.state_dict())
    assert same(flatten_optimizer(resumed, again)[0], flatten_optimizer(model, optimizer)[0])
    assert flatten_optimizer(resumed, again)[1] == flatten_optimizer(model, optimizer)[1]
    assert same(read_checkpoint(checkpoint.path).weights, checkpoint.weights)  # the file has not changed


def test_float32_state_of_bfloat16_weights_keeps_its_type(tmp_path: Path) -> None:
    model = small_model(torch.bfloat16)
    optimizer = OPTIMIZERS["float32 state"](model)
    update(model, optimizer, 0)
    tensors = load_file(through_disk(tmp_path / "step_000003", model, optimizer).path / OPTIMIZER_FILE)
    assert tensors["0.weight/master"].dtype == torch.float32
    assert tensors["0.weight/signs"].dtype == torch.int8
    assert not torch.equal(tensors["0.weight/master"], tensors["0.weight/master"].bfloat16().float())


def test_an_optimizer_without_state_is_restored(tmp_path: Path) -> None:
    model = small_model(torch.float32)
    checkpoint = through_disk(tmp_path / "step_000003", model, OPTIMIZERS["AdamW fused"](model))
    assert checkpoint.optimizer_tensors == {}
    again = OPTIMIZERS["AdamW fused"](model)
    restore_optimizer(model, again, checkpoint.optimizer_tensors, checkpoint.state["optimizer"])
    assert not again.state


def test_parameters_without_a_gradient_need_no_state(tmp_path: Path) -> None:
    def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = small_model(torch.float32, seed)
        next(model.parameters()).requires_grad_(False)
        return model, OPTIMIZERS["AdamW fused"](model)

    model, optimizer = build(0)
    update(model, optimizer, 0)
    checkpoint = through_disk(tmp_path / "step_000003", model, optimizer)
    assert not any(name.startswith("0.weight/") for name in checkpoint.optimizer_tensors)
    resumed, again = build(1)
    resumed.load_state_dict(checkpoint.weights)
    restore_optimizer(resumed, again, checkpoint.optimizer_tensors, checkpoint.state["optimizer"])
    update(model, optimizer, 1)
    update(resumed, again, 1)
    assert same(resumed.state_dict(), model.state_dict())


def test_tensors_are_named_by_parameter_and_key() -> None:
    model = small_model(torch.float32)
    optimizer = OPTIMIZERS["AdamW fused"](model)
    update(model, optimizer, 0)
    tensors, structure = flatten_optimizer(model, optimizer)
    names = [name for name, _ in model.named_parameters()]
    assert sorted(tensors) == sorted(f"{name}/{key}" for name in names for key in ("exp_avg", "exp_avg_sq", "step"))
    assert structure["class"] == "AdamW"
    assert [group["params"] for group in structure["groups"]] == [["0.bias", "2.bias"], ["0.weight", "2.weight"]]
    assert structure["groups"][0]["settings"]["betas"] == [0.8, 0.95]
    assert structure["state"]["0.bias"]["step"] == {"tensor": "0.bias/step"}
    assert tensors["0.bias/exp_avg"].data_ptr() == optimizer.state[model[0].bias]["exp_avg"].data_ptr()  # no copy


@pytest.mark.parametrize("keep", [False, True])
def test_the_settings_of_the_checkpoint_replace_those_of_the_optimizer_unless_kept(keep: bool) -> None:
    model = small_model(torch.float32)
    optimizer = torch.optim.AdamW(groups_of(model), lr=0.01, betas=(0.8, 0.9), weight_decay=0.5)
    update(model, optimizer, 0)
    tensors, structure = flatten_optimizer(model, optimizer)
    again = torch.optim.AdamW(groups_of(model), lr=0.02, betas=(0.5, 0.6), weight_decay=0.1)
    restore_optimizer(model, again, tensors, structure, keep_settings=keep)
    facts = [(group["lr"], group["betas"], group["weight_decay"]) for group in again.param_groups]
    assert facts == [(0.02, (0.5, 0.6), 0.1) if keep else (0.01 * 0.9, (0.8, 0.9), 0.5)] * 2
    assert same(flatten_optimizer(model, again)[0], tensors)


def test_another_optimizer_or_other_groups_are_refused() -> None:
    model = small_model(torch.float32)
    tensors, structure = flatten_optimizer(model, OPTIMIZERS["AdamW fused"](model))
    with pytest.raises(CheckpointError, match="has the state of AdamW, this run trains with SGD"):
        restore_optimizer(model, OPTIMIZERS["SGD"](model), tensors, structure)
    for other in (torch.optim.AdamW(model.parameters()), torch.optim.AdamW(groups_of(model)[::-1])):
        with pytest.raises(CheckpointError, match="the parameter groups of the optimizer are not those"):
            restore_optimizer(model, other, tensors, structure)


def test_state_that_a_checkpoint_cannot_hold_is_refused() -> None:
    model = small_model(torch.float32)
    optimizer = OPTIMIZERS["AdamW fused"](model)
    optimizer.state[model[0].bias]["odd"] = object()
    with pytest.raises(ValueError, match=r"the optimizer's 0\.bias/odd is a object, which a checkpoint cannot hold"):
        flatten_optimizer(model, optimizer)
    with pytest.raises(ValueError, match="a parameter that is not the model's"):
        flatten_optimizer(nn.Linear(1, 1), OPTIMIZERS["SGD"](model))
