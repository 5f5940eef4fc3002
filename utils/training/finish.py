"""What is written at the end of a run: the export, the flight recorder, the curves, the checksums."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from utils.checkpoints.files import Checkpoint, read_checkpoint
from utils.checkpoints.folder import CheckpointError, folder_name
from utils.checkpoints.tensors import stream_order
from utils.files import read_json_or_empty
from utils.formats.adapter import write_adapter
from utils.inference.export import outlines_of, save_export, stream_export
from utils.nn.lora import adapter_settings
from utils.runs.curves import draw_curves
from utils.runs.layout import ADAPTER, CHECKPOINTS, CURVES, EXPORT, FLIGHT_RECORDER, PRETRAINED, SEAL
from utils.runs.metrics import decode_number, encode_number
from utils.runs.origin import PRETRAINED_PREFIX
from utils.runs.run import Run
from utils.runs.seal import write_seal
from utils.terminal.console import Terminal
from utils.training.flight_recorder import FlightRecorder
from utils.training.state import TrainState, load_weights


def warn_if_possible(terminal: Terminal, run: Run) -> Callable[[str], None]:
    """A function that prints a warning if possible: while one failure is handled, a full disk must not cause another.

    It prints nothing if the run directory was deleted, since all later writes fail for that reason.
    """

    def warn(message: str) -> None:
        with contextlib.suppress(OSError):  # logs/train.log may not be writable
            if run.path.exists():
                terminal.warn(message)

    return warn


def export(state: TrainState, run: Run, terminal: Terminal) -> str:
    """Export the weights of the last step or of the best val/loss; return which, in words.

    If the model is sharded, all ranks take part (`follow_export`).
    """
    best: Checkpoint | None = None
    step, losses, which = state.step, dict(state.losses or {}), "last"
    if state.config.train.exports_best and state.best_step == state.step:
        which = "best"
    elif state.config.train.exports_best:
        try:
            best = read_checkpoint(run.path / CHECKPOINTS / folder_name(state.best_step or 0))
            if state.shards is None:
                load_weights(state, best)
            step, which = best.step, "best"
            evaluated = best.state["losses_step"] == step  # not if a signal cut this evaluation short: a resume made it
            losses = best.state["losses"] if evaluated else {"val/loss": state.best_val_loss}
        except CheckpointError as error:
            terminal.warn(f"{error}: the export is made from the last weights")
    training: dict[str, Any] = {
        "run": run.id,
        "weights": which,
        "step": step,
        **{name: encode_number(decode_number(loss)) for name, loss in losses.items()},
        "dataset": state.corpus.name,
        "corpus_hash": state.corpus.hash,
    }
    if state.config.optimizer.lora_rank is not None:
        training["lora"] = adapter_settings(state.config.optimizer)
    if state.config.data.packing != "random":
        training["packing"] = state.config.data.packing
    place = run.path / EXPORT
    if state.shards is not None:
        stream_export(place, state.model, state.corpus.tokenizer, training, _pieces(state, best))
    else:
        more = partial(_write_adapter, state=state, run=run)
        save_export(place, state.model, state.corpus.tokenizer, training, more)
    return f"{which} weights, of step {step:,}"


def _pieces(state: TrainState, best: Checkpoint | None) -> Callable[[str], Iterable[torch.Tensor]]:
    """On rank 0: a function from a name to the pieces of that weight, from the ranks' shards or a checkpoint."""
    shards = state.shards
    assert shards is not None
    state.ranks.share("export", "memory" if best is None else "checkpoint")
    if best is None:
        return lambda name: shards.pieces(name, shards.own[name])
    return lambda name: [best.weights[name]]


def follow_export(state: TrainState) -> None:
    """On another rank: send the weights that `export` asks for."""
    shards = state.shards
    assert shards is not None
    if state.ranks.share("export", None) == "memory":
        for name in stream_order(outlines_of(state.model)):
            for _ in shards.pieces(name, shards.own[name]):
                pass


def _write_adapter(folder: Path, state: TrainState, run: Run) -> None:
    """If the model has adapters, add them to an export as files of their own."""
    settings = state.config.optimizer
    if settings.lora_rank is not None:
        pretrained = read_json_or_empty(run.path / PRETRAINED, run.path)  # empty without a published model
        parent = (run.record.get("parent") or {}).get("run")
        if not str(parent).startswith(PRETRAINED_PREFIX):  # the adapters do not fit the published weights themselves
            pretrained = {key: value for key, value in pretrained.items() if key not in ("name", "revision")}
        write_adapter(folder / ADAPTER, state.model, settings, pretrained)


def dump_flight_recorder(recorder: FlightRecorder, run: Run, reason: str, terminal: Terminal) -> None:
    """Write artifacts/flight_recorder.json; a failure is only a warning, since the run has already failed."""
    path = run.path / FLIGHT_RECORDER
    try:
        recorder.dump(path, reason)
    except (OSError, RuntimeError) as error:  # RuntimeError: a GPU that has failed returns no numbers
        warn_if_possible(terminal, run)(f"{path.name} was not written: {error}")


def draw(run: Run, terminal: Terminal) -> None:
    """Draw artifacts/curves.png; a failure is only a warning."""
    try:
        draw_curves(run.path)
    except Exception as error:  # a picture must not end a run
        warn_if_possible(terminal, run)(f"{CURVES.name} was not drawn: {type(error).__name__}: {error}")


def seal_run(run: Run, terminal: Terminal) -> None:
    """Write the checksums of the run's record, after the last line of logs/train.log."""
    try:
        terminal.close()
        write_seal(run.path)
    except OSError as error:
        warn = warn_if_possible(terminal, run)
        warn(f"{SEAL.name} was not written: {error.strerror}; `experiments.py check` will not know this run")
