"""The training loop: one linear function, and the parts of one optimizer update."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from utils.machine.device import autocast
from utils.machine.signals import Deadline, StopRequest
from utils.optim.groups import apply_schedules
from utils.training.callbacks import Callbacks
from utils.training.checkpointer import Checkpointer
from utils.training.evaluate import evaluate
from utils.training.monitor import Monitor
from utils.training.phases import Phase, no_phase
from utils.training.state import TrainState
from utils.training.step_buffer import NonFiniteError

if TYPE_CHECKING:
    from utils.profiling.in_run import RunProfiler


def forward_backward(state: TrainState, phase: Phase = no_phase) -> torch.Tensor:
    """Gradients of batch `state.step`, accumulated over its micro-steps; its mean loss, on the device."""
    micro_steps = state.config.train.gradient_accumulation_steps
    total = torch.zeros((), device=state.device)
    for micro_step in range(micro_steps):
        with phase("data"):
            inputs, targets = state.sampler.train_batch(state.step, micro_step, micro_steps)
        with phase("forward"), autocast(state.device, state.dtype):
            _, loss = state.forward(inputs, targets)
            loss = loss / micro_steps if micro_steps > 1 else loss
        with phase("backward"):
            state.scaler.scale(loss).backward()
            state.sampler.prefetch(*divmod(state.step * micro_steps + micro_step + 1, micro_steps), micro_steps)
        total += loss.detach()
    return total


def clip_gradients(state: TrainState) -> torch.Tensor:
    """Scale gradients down to grad_clip; before that the norm of each parameter group, (groups,), on the device.

    The global norm is the norm of these norms.
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
        if state.device.type != "cpu" or not factor >= 1:  # another device does it anyway: to know would be a wait
            torch._foreach_mul_(gradients, factor.clamp(max=1.0))
    return norms


def optimizer_step(state: TrainState) -> None:
    """Update the weights from the gradients and clear them; the step is done."""
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1


def training_loop(
    state: TrainState,
    monitor: Monitor,
    callbacks: Callbacks,
    checkpoints: Checkpointer,
    profiler: RunProfiler,
    stop: StopRequest,
    deadline: Deadline,
) -> None:
    """Train until `state.max_iters` updates are done, early stopping ends it, or a stop is requested.

    The last thing done is a checkpoint of where it stopped.

    Raises:
        NonFiniteError: a loss or gradient became NaN or infinite; the log is complete up to there, and no
            checkpoint has been saved since.
    """
    settings = state.config.train

    def save() -> None:
        monitor.flush()  # what is saved is known to be finite
        checkpoints.save(state)
        monitor.pause_over()

    state.model.train()
    deadline.step_done()  # starts its clock: the first evaluation counts as a step
    try:
        callbacks.on_start()
        while True:
            evaluation_due = state.step % settings.eval_interval == 0 or state.step == state.max_iters
            if evaluation_due and state.losses_step != state.step:
                monitor.flush()
                evaluate(state, monitor, callbacks)
                monitor.pause_over()
                # Step 0 needs one only where the export may be made from it: weights that were trained before.
                if settings.keep_best and state.best_step == state.step and (state.step or settings.exports_best):
                    save()
            deadline.step_done()
            if deadline.is_near(reserve=checkpoints.seconds_to_save(state)):
                stop.stop(f"max_minutes ({settings.max_minutes:g}) are almost over")
            if settings.stop_at_step is not None and state.step >= settings.stop_at_step:
                stop.stop(f"stop_at_step ({settings.stop_at_step:,}) is reached")
            if state.finished or stop:
                save()
                return
            if checkpoints.due(state.step) or stop.save:
                stop.save = False
                save()
            step = state.step
            lr = apply_schedules(state.optimizer, step, state.config.optimizer, state.max_iters)
            with profiler.watch(step) as phase:
                loss = forward_backward(state, phase)
                with phase("optimizer"):
                    grad_norms = clip_gradients(state)
                with phase("logging"):
                    monitor.step(step, loss, grad_norms, lr)
                with phase("optimizer"):
                    optimizer_step(state)
            callbacks.on_step(step, loss)
            monitor.step_done()
            if profiler.ready:
                monitor.flush()
                profiler.save()
                monitor.pause_over()
    except BaseException:
        with contextlib.suppress(NonFiniteError):  # what ended training counts
            monitor.flush()
        raise
