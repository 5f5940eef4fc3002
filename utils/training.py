"""The training loop: one linear function, and the parts of one optimizer update."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from data import BatchSampler, Corpus
from model import LanguageModel
from utils.config import Config
from utils.console import Terminal, TrainingProgress
from utils.device import autocast
from utils.evaluation import estimate_loss, evaluating
from utils.generation import SamplingOptions, generate_tokens, start_tokens
from utils.histograms import histogram_records
from utils.optim import build_optimizer, learning_rate_at, set_learning_rate
from utils.run_log import RunLog, metric_record
from utils.signals import StopRequest
from utils.step_buffer import NonFiniteLossError, StepBuffer

# Names a part of a step: record_function under the profiler, nothing otherwise.
Phase = Callable[[str], AbstractContextManager[object]]


def no_phase(_name: str) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


@dataclass
class TrainState:
    """What training changes (model, optimizer, scaler, step, best) and what it reads."""

    config: Config
    max_iters: int
    device: torch.device
    dtype: torch.dtype
    corpus: Corpus
    sampler: BatchSampler
    model: LanguageModel
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]  # the model, or its compiled form
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    losses: dict[str, float] | None = None  # of the last evaluation,
    losses_step: int | None = None  # which was at this step
    best_val_loss: float = math.inf
    best_step: int | None = None

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.model.block_size


def build_state(
    config: Config, max_iters: int, corpus: Corpus, device: torch.device, dtype: torch.dtype, terminal: Terminal
) -> TrainState:
    """Model, optimizer and sampler on the device; the random state must be seeded already."""
    model = LanguageModel(config.model, corpus.tokenizer.vocab_size).to(device)
    sampler = BatchSampler(corpus, config.model.block_size, config.train.batch_size, config.train.seed, device)
    state = TrainState(
        config=config,
        max_iters=max_iters,
        device=device,
        dtype=dtype,
        corpus=corpus,
        sampler=sampler,
        model=model,
        forward=model,
        optimizer=build_optimizer(model, config.optimizer),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
    )
    if config.train.compile:
        state.forward = compile_model(state, terminal)
    return state


def compile_model(state: TrainState, terminal: Terminal) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The compiled model, or the model itself with one warning if the backend fails on a trial step."""
    backend = "aot_eager" if state.device.type == "mps" else "inductor"
    compiled = torch.compile(state.model, backend=backend)
    devices = [state.device] if state.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):  # on CPU and CUDA the trial does not shift the dropout of step 0
            with autocast(state.device, state.dtype):
                _, loss = compiled(*state.sampler.train_batch(0, 0, state.config.train.gradient_accumulation_steps))
            loss.backward()
    except Exception as error:  # a compiler can fail in any way; training can always go on without it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        terminal.warn(f"torch.compile ({backend}) failed, going on in eager mode: {type(error).__name__}: {reason}")
        return state.model
    finally:
        state.optimizer.zero_grad(set_to_none=True)
    return compiled


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
    """Scale gradients down to grad_clip; the global norm before that, on the device."""
    state.scaler.unscale_(state.optimizer)
    largest = state.config.optimizer.grad_clip or math.inf
    return torch.nn.utils.clip_grad_norm_(state.model.parameters(), largest)


def optimizer_step(state: TrainState) -> None:
    """Update the weights from the gradients and clear them; the step is done."""
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1


def training_loop(
    state: TrainState, log: RunLog, progress: TrainingProgress, stop: StopRequest, after_flush: Callable[[], None]
) -> None:
    """Train until `state.max_iters` updates are done or a stop is requested.

    Args:
        after_flush: called after each write of training records to the log.

    Raises:
        NonFiniteLossError: a loss became NaN or infinite; the log is complete up to there.
    """
    tracking, interval = state.config.tracking, state.config.train.eval_interval
    buffer = StepBuffer(log.metrics, tracking.flush_interval, tracking.log_interval, state.tokens_per_step)

    def flush() -> None:
        if not buffer.flush():
            return
        after_flush()
        if buffer.last_loss is not None and buffer.tokens_per_second is not None:
            progress.update(state.step, loss=buffer.last_loss, tokens_per_second=buffer.tokens_per_second)

    state.model.train()
    try:
        while True:
            if state.step % interval == 0 or state.step == state.max_iters:
                flush()
                evaluate(state, log, progress)
                buffer.restart_clock()
            if state.step == state.max_iters or stop:
                return
            lr = learning_rate_at(state.step, state.config.optimizer, state.max_iters)
            set_learning_rate(state.optimizer, lr)
            loss = forward_backward(state)
            grad_norm = clip_gradients(state)
            if tracking.histogram_interval and state.step % tracking.histogram_interval == 0:
                log_histograms(state, log)
            buffer.add(state.step, loss, grad_norm, lr)
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
    for loss in losses.values():
        if not math.isfinite(loss):
            raise NonFiniteLossError(state.step, loss)
    state.losses, state.losses_step = losses, state.step
    if losses["val/loss"] < state.best_val_loss:
        state.best_val_loss, state.best_step = losses["val/loss"], state.step
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
