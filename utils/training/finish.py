"""The end of a run: the export from the chosen weights, the flight recorder, status, logs and views."""

from __future__ import annotations

import contextlib
from typing import Any

from utils.checkpoints.files import read_checkpoint
from utils.checkpoints.folder import CheckpointError, folder_name
from utils.inference.export import save_export
from utils.runs.curves import draw_curves
from utils.runs.layout import CHECKPOINTS, CURVES, EXPORT, FLIGHT_RECORDER, SEAL
from utils.runs.log import RunLog
from utils.runs.metrics import decode_number, encode_number
from utils.runs.run import Run, Status
from utils.runs.seal import write_seal
from utils.terminal.console import Terminal
from utils.tracking import RunEnd
from utils.tracking.feeder import Feeders
from utils.training.flight_recorder import FlightRecorder
from utils.training.state import TrainState, load_weights


def export(state: TrainState, run: Run, terminal: Terminal) -> str:
    """artifacts/export from the chosen weights, those of the last step or of the best val/loss; which, in words."""
    step, losses, which = state.step, dict(state.losses or {}), "last"
    if state.config.train.exports_best and state.best_step == state.step:
        which = "best"
    elif state.config.train.exports_best:
        try:
            checkpoint = read_checkpoint(run.path / CHECKPOINTS / folder_name(state.best_step or 0))
            load_weights(state, checkpoint)
            step, losses, which = checkpoint.step, checkpoint.state["losses"], "best"
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
    save_export(run.path / EXPORT, state.model, state.corpus.tokenizer, training)
    return f"{which} weights, of step {step:,}"


def dump_flight_recorder(recorder: FlightRecorder, run: Run, reason: str, terminal: Terminal) -> None:
    """artifacts/flight_recorder.json; where it cannot be written, one warning, for worse has happened already."""
    path = run.path / FLIGHT_RECORDER
    try:
        recorder.dump(path, reason)
    except (OSError, RuntimeError) as error:  # RuntimeError: a GPU that has failed gives no numbers back
        terminal.warn(f"{path.name} was not written: {error}")


def draw(run: Run, terminal: Terminal) -> None:
    """artifacts/curves.png; where it cannot be made, one warning."""
    try:
        draw_curves(run.path)
    except Exception as error:  # no picture is worth a run
        terminal.warn(f"{CURVES.name} was not drawn: {type(error).__name__}: {error}")


def close_run(
    run: Run,
    log: RunLog | None,
    feeders: Feeders | None,
    state: TrainState | None,
    status: Status,
    reason: str | None,
    terminal: Terminal,
    seconds: float,
    at_once: bool,
) -> dict[str, float]:
    """Sync the logs, write the end into run.json, draw the curves, close the views within `seconds`; the summary.

    Args:
        at_once: the user does not want to wait: nothing is drawn.
    """
    summary: dict[str, float] = {}
    if state is not None and state.losses is not None:
        summary = {**state.losses, "best_val_loss": state.best_val_loss}
    try:
        if log is not None:
            log.sync()
    finally:  # before the views: whoever kills the process while they are fed finds the true status
        run.finish(
            status,
            reason,
            last_step=state.step if state else None,
            summary={name: encode_number(value) for name, value in summary.items()},
            best_step=state.best_step if state else None,
        )
        if feeders is not None:
            feeders.hurry()  # while the picture is drawn
    with contextlib.suppress(KeyboardInterrupt):  # an impatient signal leaves the picture out
        if state is not None and not at_once:
            draw(run, terminal)
    if feeders is not None:
        feeders.finish(RunEnd(status, summary, state.step if state else 0), terminal.print, seconds)
    return summary


def seal_run(run: Run, terminal: Terminal) -> None:
    """artifacts/seal.json, the last file of a run, after its last line in logs/train.log."""
    terminal.close()
    try:
        write_seal(run.path)
    except OSError as error:
        terminal.warn(f"{SEAL.name} was not written: {error.strerror}; `experiments.py check` will not know this run")
