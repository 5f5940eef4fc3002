"""An evaluation during training: losses, the best one, a sample text."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

from utils.inference.decode import generate_tokens, start_tokens
from utils.inference.evaluation import (
    BatchLoss,
    EvaluationStoppedError,
    estimate_loss,
    evaluating,
    loss_without_leaks,
)
from utils.inference.exact_match import exact_match
from utils.inference.sampling import SamplingOptions
from utils.inference.static import StaticDecoders, is_static
from utils.machine.device import autocast
from utils.nn.lean import is_patched
from utils.training.callbacks import Callbacks
from utils.training.monitor import Monitor
from utils.training.state import TrainState
from utils.training.step_buffer import NonFiniteError


def evaluation_due(state: TrainState) -> bool:
    """Whether an evaluation is due at this step and has not been made yet."""
    settings = state.config.train
    due = state.step % settings.eval_interval == 0 or state.step in (state.max_iters, *settings.eval_at)
    return due and state.losses_step != state.step


def is_best(state: TrainState) -> bool:
    """Whether the evaluation at this step calls for a checkpoint of the best weights.

    At step 0, only if the export may be made from it, since a run may start from trained weights.
    """
    settings = state.config.train
    return settings.keep_best and state.best_step == state.step and bool(state.step or settings.exports_best)


def evaluate(state: TrainState, monitor: Monitor, callbacks: Callbacks, must_stop: Callable[[], bool]) -> None:
    """Log and print the losses of both splits, the accuracy of answers and a sample text; update the best loss.

    If `must_stop` returns True between two batches, nothing is recorded; the resumed run makes this evaluation.

    Raises:
        NonFiniteError: a loss is not finite; the losses are logged.
    """
    settings = state.config.train
    eval_loss = prepare_evaluation(state)

    def watch(done: int, total: int) -> bool:
        monitor.progress.evaluating(state.step, done, total)
        return not state.ranks.any_of(must_stop())

    micro_steps = settings.gradient_accumulation_steps
    try:
        losses = estimate_loss(eval_loss, state.sampler, settings.eval_iters, micro_steps, watch, state.ranks)
    except EvaluationStoppedError:
        return
    if state.questions:
        with state.ranks.busy():  # each rank computes it for itself: all need it
            losses["val/accuracy"] = answer_accuracy(state)
    monitor.log_losses(losses)
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise NonFiniteError(state.step, name, loss)
    state.losses, state.losses_step = losses, state.step
    if losses["val/loss"] < state.best_val_loss:
        state.best_val_loss, state.best_step = losses["val/loss"], state.step
    state.early_stopping.update(losses["val/loss"])
    if state.finished:
        without = loss_without_leaks(eval_loss, state.sampler, settings.eval_iters, micro_steps, state.ranks)
        if without is not None:
            state.losses = {**losses, "val/loss_without_leaks": without}
            monitor.log(state.step, {"val/loss_without_leaks": without})
    if state.config.tracking.sample_tokens:
        with state.ranks.busy():
            monitor.log_sample(sample_text(state))
    monitor.progress.evaluation(state.step, {**losses, **state.bits_per_byte(losses)})
    callbacks.on_eval(dict(losses))  # a copy: callbacks may change it


def prepare_evaluation(state: TrainState) -> BatchLoss:
    """The function that computes losses in evaluations; the first call makes it and `state.decoders`, and keeps both.

    They use CUDA graphs if they can, but not if modules have hooks, which a recorded graph would not call.
    """
    graph = state.config.train.cuda_graph and not any(map(is_patched, state.model.modules()))
    if state.eval_loss is None or state.eval_loss.graph != graph:
        precision = functools.partial(autocast, state.device, state.dtype)
        state.eval_loss = BatchLoss(state.model, precision, graph=graph, together=state.shards is not None)
        state.decoders = StaticDecoders() if graph and is_static(state.device) else None
    return state.eval_loss


def whole_outside_blocks(state: TrainState) -> AbstractContextManager[None]:
    """Gather the weights of a sharded model outside its blocks, such as the head; each block gathers its own."""
    return contextlib.nullcontext() if state.shards is None else state.shards.whole_outside_blocks()


def answer_accuracy(state: TrainState) -> float:
    """The share of `state.questions` that the model answers correctly."""
    with whole_outside_blocks(state), evaluating(state.model):
        return exact_match(state.model, state.questions)


def sample_text(state: TrainState) -> str:
    """`sample_prompt` and `sample_tokens` tokens that continue it, drawn from the same random stream every time.

    The text begins like a document if the model is trained on whole documents.
    """
    tracking, tokenizer = state.config.tracking, state.corpus.tokenizer
    prompt = start_tokens(tokenizer, tracking.sample_prompt, state.model.document_token)
    options, seed = SamplingOptions(), state.config.train.seed
    with whole_outside_blocks(state), evaluating(state.model):
        if state.decoders is not None:
            blocks = state.decoders.generate(state.model, [prompt], tracking.sample_tokens, options, [seed])
            ids = [token for block in blocks for token in block.tokens[0]]
        else:
            ids = list(generate_tokens(state.model, prompt, tracking.sample_tokens, options, seed))
    return tracking.sample_prompt + tokenizer.decode(ids)
