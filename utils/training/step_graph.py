"""Updates as CUDA graphs: the host launches two graphs instead of a thousand kernels.

A small model's kernels take less time than their launches. One graph has the batch, the forward and backward passes
and clipping, the other the optimizer; between them the gradients can be inspected as usual. Values that change from
step to step are in tensors on the device: the offsets of the batch, the settings that schedules change, the random
state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from utils.errors import first_line
from utils.machine.graphs import capture_graph
from utils.nn.lean import is_patched
from utils.optim.adamw import EagerOptimizer
from utils.training.feed import Feed
from utils.training.lanes import LaneUpdate
from utils.training.state import TrainState
from utils.training.step import (
    EagerUpdate,
    Phase,
    Update,
    clip_gradients,
    forward_backward,
    no_phase,
    step_if_finite,
)

NUMBERS = {bool, int, float}  # types of module attributes whose values are fixed in a recording


def make_update(state: TrainState, warn: Callable[[str], None]) -> Update:
    """The kind of update that device and settings call for."""
    if state.shards is not None:
        from utils.training.sharded_update import ShardedUpdate

        return ShardedUpdate(state)
    if state.ranks.several or state.config.train.lanes is not None:
        return LaneUpdate(state)
    wanted = state.config.train.cuda_graph and state.device.type == "cuda" and not state.scaler.is_enabled()
    return GraphUpdate(state, warn) if wanted else EagerUpdate(state)


class Recording:
    """An update recorded as two CUDA graphs, with the present model and the present fixed settings of its optimizer.

    loss, grad_norms: the result of the last launch, see `Update.gradients`; the next launch overwrites them.

    Raises:
        RuntimeError: CUDA cannot record it, for instance because a part of the model waits for the device.
    """

    def __init__(self, state: TrainState) -> None:
        self.state = state
        self.loss = torch.zeros((), device=state.device)
        self.grad_norms = torch.zeros(len(state.optimizer.param_groups), device=state.device)
        self._feed = Feed(state.sampler, state.config.train.gradient_accumulation_steps)
        self._feed.load(state.step)
        self._launch_gradients = capture_graph(self._gradients, state.device)
        self._grads = [(parameter, parameter.grad) for parameter in state.model.parameters()]
        self._launch_optimizer = capture_graph(lambda: step_if_finite(state, self.grad_norms), state.device)
        self._kept = fixed_settings(state.optimizer), fixed_parts(state)

    def is_current(self) -> bool:
        """Whether model and optimizer are still as they were recorded; a callback may have changed them."""
        return self._kept == (fixed_settings(self.state.optimizer), fixed_parts(self.state))

    def _gradients(self) -> None:
        self.state.optimizer.zero_grad(set_to_none=True)
        self.loss.copy_(forward_backward(self.state, no_phase, self._feed))
        self.grad_norms.copy_(clip_gradients(self.state))

    def gradients(self) -> None:
        """Compute `loss`, `grad_norms` and the gradients of batch `state.step`."""
        self._feed.load(self.state.step)
        for parameter, grad in self._grads:
            parameter.grad = grad  # an eager update in between has replaced it
        self._launch_gradients()

    def apply(self) -> None:
        """Update the weights with the gradients that `gradients` computed."""
        assert isinstance(self.state.optimizer, EagerOptimizer)
        self.state.optimizer.publish()
        self._launch_optimizer()


class GraphUpdate:
    """Updates by CUDA graphs, which are recorded after a first eager update; if that fails, updates stay eager.

    An update whose phases are watched (by a profiler) is eager as well.

    Args:
        warn: prints one line to the user if updates cannot be recorded.
    """

    message_bytes = 0

    def __init__(self, state: TrainState, warn: Callable[[str], None]) -> None:
        self.state, self._warn = state, warn
        self._eager = EagerUpdate(state)
        self._warm = self._refused = self._launched = False
        self._recording: Recording | None = None
        self._needed = 0  # bytes that the gradients of an update and all that they are computed from take

    def gradients(self, phase: Phase) -> tuple[torch.Tensor, torch.Tensor]:
        self._launched = self._warm and phase is no_phase and self._is_recorded()
        if not self._launched or self._recording is None:
            self.state.optimizer.zero_grad(set_to_none=True)
            return self._eager.gradients(phase) if self._warm else self._first_gradients(phase)
        self._recording.gradients()
        return self._recording.loss.clone(), self._recording.grad_norms.clone()

    def _first_gradients(self, phase: Phase) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the gradients of the first update and measure their memory, before the optimizer's state exists."""
        device, self._warm = self.state.device, True
        if device.type != "cuda":
            return self._eager.gradients(phase)
        torch.cuda.reset_peak_memory_stats(device)  # forget an evaluation, or another run in this process
        stays = torch.cuda.memory_allocated(device)
        result = self._eager.gradients(phase)
        self._needed = torch.cuda.max_memory_allocated(device) - stays
        return result

    def apply(self, grad_norms: torch.Tensor) -> None:
        if not self._launched or self._recording is None:
            self._eager.apply(grad_norms)
            return
        self._recording.apply()
        self.state.step += 1

    def _is_recorded(self) -> bool:
        """Make a recording if there is none or it is out of date; return whether there is one now."""
        if self._refused:
            return False
        if self._recording is not None and self._recording.is_current():
            return True
        self._recording = None
        reason = obstacle(self.state, self._needed)
        if not reason:
            try:
                self._recording = Recording(self.state)
            except RuntimeError as error:
                reason = first_line(error)
        if reason:
            self._refused = True
            self._warn(f"cuda_graph: steps are not recorded, each kernel is launched by itself: {reason}")
        return self._recording is not None


def fixed_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of the parameter groups that are fixed in a recording."""
    assert isinstance(optimizer, EagerOptimizer)
    changing = {"params", *optimizer.scheduled}
    return [{name: value for name, value in group.items() if name not in changing} for group in optimizer.param_groups]


def fixed_parts(state: TrainState) -> object:
    """The properties of the model that are fixed in a recording.

    These are the addresses of its weights, which of them are trained, the numbers and switches of its modules (a
    dropout's rate, training mode), and whether a call or a backward pass runs hooks.

    Only callbacks change them, so without callbacks they are not compared at each step.
    """
    if not state.callbacks:
        return None
    modules = list(state.model.modules())
    weights = [weight for module in modules for weight in module._parameters.values() if weight is not None]
    return (
        [(weight.data_ptr(), weight.requires_grad) for weight in weights],
        [value for module in modules for value in vars(module).values() if type(value) in NUMBERS],
        any(map(is_patched, modules)) or any(map(has_hooks, weights)),
    )


def has_hooks(weight: torch.Tensor) -> bool:
    """Whether the gradient of a weight goes through hooks."""
    return bool(weight._backward_hooks or weight._post_accumulate_grad_hooks)


def obstacle(state: TrainState, needed: int) -> str:
    """The reason why the updates of a state cannot be recorded; empty if none is known.

    Args:
        needed: bytes on CUDA that the gradients of an update take, with all that they are computed from.
    """
    if not isinstance(state.optimizer, EagerOptimizer):
        return f"{type(state.optimizer).__name__} does not support it"
    if state.model.recomputes and state.config.model.dropout:
        return "activation_checkpointing saves the random state of dropout on the host"
    if any(map(is_patched, state.model.modules())):
        return "a module has hooks or a patched forward, which a recording would not call"
    if any(map(has_hooks, state.model.parameters())):
        return "a parameter has hooks, which a recording would not call"
    if state.device.type == "cuda":
        unused = torch.cuda.memory_reserved(state.device) - torch.cuda.memory_allocated(state.device)
        free = torch.cuda.mem_get_info(state.device)[0] + unused
        if 2 * needed > free:  # a recording keeps its memory, and evaluations need as much again
            return f"it would keep {needed / 1e9:.1f} GB, evaluations need as much, and {free / 1e9:.1f} GB are free"
    return ""
