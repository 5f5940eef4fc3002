"""One optimizer update: gradients, clipping, the update, and the named phases that a profiler watches."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch.profiler import record_function

from utils.machine.device import autocast, synchronize
from utils.training.feed import Feed
from utils.training.state import TrainState

COMMUNICATION = "communication"  # between ranks, as far as they wait for it after the backward pass
PHASES = ("data", "forward", "backward", COMMUNICATION, "optimizer", "logging")

Phase = Callable[[str], AbstractContextManager[object]]  # names a part of a step


def no_phase(_name: str) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


class PhaseClock:
    """Wall time of each phase; each ends by waiting for the device, so that it is charged for its own work only."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds, self.calls = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name] += time.perf_counter() - began
        self.calls[name] += 1


class MarkedClock(PhaseClock):
    """A clock whose phases appear in the profiler's trace as well."""

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with record_function(name), super().__call__(name):
            yield


class Update(Protocol):
    """One optimizer update in two parts, between which the gradients can be inspected.

    message_bytes: bytes that this rank sends to others per update.
    """

    @property
    def message_bytes(self) -> int: ...

    def gradients(self, phase: Phase) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the gradients of batch `state.step` and clip them.

        Returns:
            The mean loss of the batch, (), and the norm of each parameter group before clipping, (groups,); both on
            the device.
        """
        ...

    def apply(self, grad_norms: torch.Tensor) -> None:
        """Update the weights and count the step. If a gradient is not finite, weights and optimizer do not change."""
        ...


class EagerUpdate:
    """An update whose kernels the host launches one by one."""

    @property
    def message_bytes(self) -> int:
        return 0

    def __init__(self, state: TrainState) -> None:
        self.state = state

    def gradients(self, phase: Phase) -> tuple[torch.Tensor, torch.Tensor]:
        loss = forward_backward(self.state, phase)
        with phase("optimizer"):
            return loss, clip_gradients(self.state)

    def apply(self, grad_norms: torch.Tensor) -> None:
        optimizer_step(self.state, grad_norms)


def forward_backward(state: TrainState, phase: Phase = no_phase, feed: Feed | None = None) -> torch.Tensor:
    """Add up the gradients of an update over its micro-steps.

    Args:
        feed: provides the batches; None: the sampler makes those of `state.step`.

    Returns:
        The mean loss of the batch over all its targets, (), on the device.
    """
    micro_steps = state.config.train.gradient_accumulation_steps
    total = torch.zeros((), device=state.device)
    for number in range(micro_steps):
        total += micro_step(state, number, micro_steps, state.step * micro_steps + number + 1, phase, feed)
    return total


def micro_step(
    state: TrainState, number: int, micro_steps: int, following: int, phase: Phase = no_phase, feed: Feed | None = None
) -> torch.Tensor:
    """Add the gradients of one micro-step of update `state.step` to those accumulated so far.

    Args:
        following: the next micro-step, counted over all updates; its batch is prefetched.

    Returns:
        Its contribution to the mean loss of the batch, (), on the device.
    """
    with phase("data"):
        if feed is None:
            inputs, targets = state.sampler.train_batch(state.step, number, micro_steps)
            share = state.sampler.target_share(state.step, number, micro_steps)
        else:
            inputs, targets = feed.batch(number)
            share = feed.target_share(number)
    with phase("forward"), autocast(state.device, state.dtype):
        loss = state.loss(inputs, targets)
        if share is not None:  # 0 if no target counts, and then the mean is NaN
            loss = torch.where(share > 0, loss * share, 0.0)
        elif micro_steps > 1:
            loss = loss / micro_steps
    with phase("backward"):
        state.scaler.scale(loss).backward()
        if feed is None:
            state.sampler.prefetch(*divmod(following, micro_steps), micro_steps)
    return loss.detach()


def clip_gradients(state: TrainState) -> torch.Tensor:
    """Scale the gradients down to a global norm of at most grad_clip.

    Returns:
        The norm of each parameter group before that, (groups,), on the device; the norm of this vector is the global
        norm.
    """
    state.scaler.unscale_(state.optimizer)
    groups = [[p.grad for p in group["params"] if p.grad is not None] for group in state.optimizer.param_groups]
    gradients = [gradient for group in groups for gradient in group]
    if not gradients:
        return torch.zeros(len(groups), device=state.device)
    each = torch.stack(torch._foreach_norm(gradients)).split([len(group) for group in groups])
    norms = torch.stack([of_group.norm() for of_group in each])
    if state.config.optimizer.grad_clip:
        factor = state.config.optimizer.grad_clip / (norms.norm() + 1e-6)
        if state.device.type != "cpu" or factor < 1:  # on another device, the comparison would wait for it
            torch._foreach_mul_(gradients, factor.clamp(max=1.0))
    return norms


def optimizer_step(state: TrainState, grad_norms: torch.Tensor | None = None) -> None:
    """Update the weights, clear the gradients and count the step.

    If a gradient is not finite, weights and optimizer do not change, and the host does not wait for the device to find
    out. Under float16 the GradScaler sees to this. Otherwise, on CUDA the optimizer's kernels read `found_inf`, torch's
    convention for the GradScaler; where they cannot (MPS, some optimizers of torch), the step is made and undone.

    Args:
        grad_norms: the result of `clip_gradients`, (groups,); None: the gradients are known to be finite.
    """
    step_if_finite(state, grad_norms)
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1


def step_if_finite(state: TrainState, grad_norms: torch.Tensor | None) -> None:
    """Update the weights unless a gradient is not finite: the part of `optimizer_step` that runs on the device."""
    optimizer: Any = state.optimizer
    if state.scaler.is_enabled():
        state.scaler.step(optimizer)
        state.scaler.update()
    elif grad_norms is None:
        optimizer.step()
    elif state.device.type == "cpu":  # nothing to wait for: the norms are computed already
        if torch.isfinite(grad_norms.norm()):
            optimizer.step()
    elif state.device.type == "cuda" and getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~torch.isfinite(grad_norms.norm())).float()
        optimizer.step()
        del optimizer.found_inf
    else:
        step_and_undo(optimizer, torch.isfinite(grad_norms.norm()))


def step_and_undo(optimizer: torch.optim.Optimizer, finite: torch.Tensor) -> None:
    """Make an optimizer step, undone on the device unless `finite`, (); needs memory to copy all that it changes."""

    def changed() -> dict[tuple[torch.Tensor, str], torch.Tensor]:
        params = {
            (p, ""): p.detach() for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        }
        states = {(p, key): value for p, state in optimizer.state.items() for key, value in state.items()}
        return params | {key: value for key, value in states.items() if isinstance(value, torch.Tensor)}

    before = {key: tensor.clone() for key, tensor in changed().items()}
    optimizer.step()
    for key, tensor in changed().items():  # state that this step has created goes back to zero, its initial value
        old = before[key] if key in before else torch.zeros_like(tensor)
        tensor.copy_(torch.where(finite, tensor, old))
