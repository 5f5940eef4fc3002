"""The training loop: one linear function, and the parts of one optimizer update."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from utils.checkpointing import Checkpointer
from utils.console import TrainingProgress
from utils.device import autocast
from utils.evaluation import estimate_loss, evaluating
from utils.flight_recorder import FlightRecorder
from utils.generation import SamplingOptions, generate_tokens, start_tokens
from utils.histograms import histogram_records
from utils.optim import learning_rate_at, set_learning_rate
from utils.run_log import RunLog, metric_record
from utils.signals import Deadline, StopRequest
from utils.step_buffer import NonFiniteError, StepBuffer
from utils.train_state import TrainState

# Names a part of a step: record_function under the profiler, nothing otherwise.
Phase = Callable[[str], AbstractContextManager[object]]


def no_phase(_name: str) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


def forward_backward(state: TrainState, phase: Phase = no_phase) -> torch.Tensor:
    """Gradients of batch `state.step`, accumulated over its micro-steps; its mean loss, on the device."""
    micro_steps = state.config.train.gradient_accumulation_steps
    total = torch.zeros((), device=state.device)
    for micro_step in range(micro_steps):
        with phase("data"):
            inputs, targets = state.sampler.train_batch(state.step, micro_step, micro_steps)
        with phase("forward"), autocast(state.device, state.dtype):
            _, loss = state.forward(inputs, targets)
            loss = loss / micro_steps
        with phase("backward"):
            state.scaler.scale(loss).backward()
        total += loss.detach()
    return total


def clip_gradients(state: TrainState) -> torch.Tensor:
    """Scale gradients down to grad_clip; before that the norm of each parameter group, (groups,), on the device.

    The global norm is the norm of these norms.
    """
    state.scaler.unscale_(state.optimizer)
    groups = [[p for p in group["params"] if p.grad is not None] for group in state.optimizer.param_groups]
    norms = torch.stack([torch.nn.utils.get_total_norm([p.grad for p in g]).to(state.device) for g in groups])
    if state.config.optimizer.grad_clip:
        parameters = [p for group in groups for p in group]
        torch.nn.utils.clip_grads_with_norm_(parameters, state.config.optimizer.grad_clip, norms.norm())
    return norms


def optimizer_step(state: TrainState) -> None:
    """Update the weights from the gradients and clear them; the step is done."""
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1


def training_loop(
    state: TrainState,
    log: RunLog,
    progress: TrainingProgress,
    stop: StopRequest,
    deadline: Deadline,
    checkpoints: Checkpointer,
    recorder: FlightRecorder,
    after_flush: Callable[[], None],
) -> None:
    """Train until `state.max_iters` updates are done, early stopping ends it, or a stop is requested.

    The last thing done is a checkpoint of where it stopped.

    Args:
        after_flush: called after each write of training records to the log.

    Raises:
        NonFiniteError: a loss or gradient became NaN or infinite; the log is complete up to there, and no
            checkpoint has been saved since.
    """
    tracking, settings = state.config.tracking, state.config.train
    buffer = StepBuffer(
        log.metrics,
        tracking.flush_interval,
        tracking.log_interval,
        state.tokens_per_step,
        tolerance=settings.skip_nonfinite if state.scaler.is_enabled() else 0,
        nonfinite_in_a_row=state.nonfinite_in_a_row,
    )

    def flush() -> None:
        if not buffer.flush():
            return
        state.nonfinite_in_a_row = buffer.nonfinite_in_a_row
        after_flush()
        if buffer.last_loss is not None and buffer.tokens_per_second is not None:
            progress.update(state.step, loss=buffer.last_loss, tokens_per_second=buffer.tokens_per_second)

    def save() -> None:
        flush()  # what is saved is known to be finite
        checkpoints.save(state)
        buffer.restart_clock()

    state.model.train()
    deadline.is_near(reserve=0.0)  # the first evaluation counts as a step
    try:
        while True:
            evaluation_due = state.step % settings.eval_interval == 0 or state.step == state.max_iters
            if evaluation_due and state.losses_step != state.step:
                flush()
                evaluate(state, log, progress)
                buffer.restart_clock()
                # Step 0 needs one only where the export may be made from it: weights that were trained before.
                if settings.keep_best and state.best_step == state.step and (state.step or settings.exports_best):
                    save()
            if deadline.is_near(reserve=checkpoints.seconds_to_save(state)):
                stop.stop(f"max_minutes ({settings.max_minutes:g}) are almost over")
            if state.finished or stop:
                save()
                return
            if checkpoints.due(state.step) or stop.save:
                stop.save = False
                save()
            lr = learning_rate_at(state.step, state.config.optimizer, state.max_iters)
            set_learning_rate(state.optimizer, lr)
            loss = forward_backward(state)
            grad_norms = clip_gradients(state)
            if tracking.histogram_interval and state.step % tracking.histogram_interval == 0:
                log_histograms(state, log)
            buffer.add(state.step, loss, grad_norms, lr)
            recorder.record(state.step, loss, grad_norms, lr)
            optimizer_step(state)
            if buffer.due():
                flush()
            progress.update(state.step)
    finally:
        buffer.flush()


def evaluate(state: TrainState, log: RunLog, progress: TrainingProgress) -> None:
    """Losses of both splits and a sample text, to the log and the terminal; keeps the best."""
    settings = state.config.train
    losses = estimate_loss(
        state.model,
        state.sampler,
        settings.eval_iters,
        settings.gradient_accumulation_steps,
        lambda: autocast(state.device, state.dtype),
    )
    tokens = state.step * state.tokens_per_step
    log.metrics.write([metric_record(state.step, time.time(), {"tokens": tokens, **losses})])
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise NonFiniteError(state.step, name, loss)
    state.losses, state.losses_step = losses, state.step
    if losses["val/loss"] < state.best_val_loss:
        state.best_val_loss, state.best_step = losses["val/loss"], state.step
    state.early_stopping.update(losses["val/loss"])
    if state.config.tracking.sample_tokens:
        record = {"step": state.step, "time": round(time.time(), 4), "text": sample_text(state)}
        log.samples.write([record])
    progress.evaluation(state.step, losses)


def sample_text(state: TrainState) -> str:
    """A text of `sample_tokens` tokens after `sample_prompt`; the same random stream every time."""
    tracking, tokenizer = state.config.tracking, state.corpus.tokenizer
    prompt = start_tokens(tokenizer, tracking.sample_prompt)
    with evaluating(state.model):
        ids = generate_tokens(state.model, prompt, tracking.sample_tokens, SamplingOptions(), state.config.train.seed)
        return tracking.sample_prompt + tokenizer.decode(ids)


def log_histograms(state: TrainState, log: RunLog) -> None:
    """Parameters before update `step` and the (clipped) gradients of its batch."""
    named = dict(state.model.named_parameters())
    tensors: dict[str, torch.Tensor] = {f"params/{name}": p for name, p in named.items()}
    tensors |= {f"grads/{name}": p.grad for name, p in named.items() if p.grad is not None}
    log.histograms.write(histogram_records(state.step, time.time(), tensors))
