"""Callbacks: the user's own classes, which training calls (docs/callbacks.md)."""

from __future__ import annotations

import importlib
import sys
import sysconfig
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from utils.errors import UserError, nearest, typed_line
from utils.machine.signals import StopRequest
from utils.runs.imported import is_edited
from utils.runs.trust import check_callback_place
from utils.training.state import TrainState

Log = Callable[[int, Mapping[str, float | torch.Tensor]], None]  # takes a step and numbers by metric name


class TrainingRun:
    """What a callback may read and do.

    path: the run directory.
    state: model, optimizer, step, losses, ...; a callback may change them, as training does.
    loss: the loss of the last update's batch, 0-dimensional, on the device; reading its value waits for the device.

    >>> class StopEarly(Callback):
    ...     def on_step(self, run: TrainingRun):
    ...         if run.state.step == 1000:
    ...             run.stop("a thousand steps are enough")
    """

    def __init__(self, path: Path, state: TrainState, log: Log, stop: StopRequest) -> None:
        self.path, self.state = path, state
        self.loss: torch.Tensor | None = None
        self._log, self._stop = log, stop
        self._step = state.step

    @property
    def rank(self) -> int:
        """The rank of this process; each rank has callbacks of its own (docs/ranks.md)."""
        return self.state.ranks.rank

    def log(self, values: Mapping[str, float | torch.Tensor]) -> None:
        """Log numbers under registered metric names; tensors stay on their device until the log is written.

        Numbers logged in on_step belong to the update just done and are logged at its step. If several ranks train,
        only the numbers of rank 0 are logged.

        Args:
            values: numbers, or tensors with one element, which are kept as float32.

        Raises:
            KeyError: a name that is not registered.
            TypeError, RuntimeError: a value is not one number.
        """
        self._log(self._step, values)

    def stop(self, reason: str) -> None:
        """End training after this step, as interrupted, with a checkpoint."""
        self._stop.stop(reason)


class Callback:
    """Base class of callbacks: override what you need. An exception ends the run as failed.

    on_start is called once before the first step of a session (`run.state.step` is not 0 if it resumes a run), on_step
    after each update, on_eval after each evaluation, and on_end once when a session ends for any reason except SIGKILL
    and a second Ctrl-C.

    A callback belongs in a module of its own, so that a resumed run finds it again; the setting `callbacks` names it:
    `train(callbacks=["perplexity:Perplexity"])` (docs/callbacks.md).

    >>> metric = register_metric(Metric("val/perplexity", "1", "lower"))
    >>> class Perplexity(Callback):
    ...     def on_eval(self, run: TrainingRun, losses):
    ...         run.log({"val/perplexity": math.exp(losses["val/loss"])})
    """

    def on_start(self, run: TrainingRun) -> None: ...

    def on_step(self, run: TrainingRun) -> None: ...

    def on_eval(self, run: TrainingRun, losses: Mapping[str, float]) -> None:
        """losses: val/loss and train/eval_loss, in nats per token."""

    def on_end(self, run: TrainingRun, status: str) -> None:
        """status: completed, interrupted, diverged or failed."""

    def state_dict(self) -> dict[str, Any]:
        """The state that checkpoints save, as JSON; a resumed run gets it back through `load_state_dict`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""


HOOKS = [name for name in vars(Callback) if name.startswith("on_")]


class Callbacks:
    """The callbacks of one run, called in the order of the setting."""

    def __init__(self, callbacks: Sequence[Callback], run: TrainingRun) -> None:
        self._callbacks, self._run = callbacks, run
        self._started: deque[Callback] = deque()  # those that have started and not ended yet

    def on_start(self) -> None:
        for callback in self._callbacks:
            self._started.append(callback)
            callback.on_start(self._run)
        self._clean_up()

    def on_step(self, step: int, loss: torch.Tensor) -> None:
        """Call on_step of each callback; update `step` is done."""
        if not self._callbacks:
            return
        self._run.loss, self._run._step = loss, step
        for callback in self._callbacks:
            callback.on_step(self._run)
        self._clean_up()

    def on_eval(self, losses: Mapping[str, float]) -> None:
        self._run._step = self._run.state.step
        for callback in self._callbacks:
            callback.on_eval(self._run, losses)
        self._clean_up()

    def _clean_up(self) -> None:
        """Restore training mode and drop gradients, since a callback may have left eval mode or run a backward pass."""
        model = self._run.state.model
        model.zero_grad(set_to_none=True)
        if not model.training:
            model.train()

    def on_end(self, status: str) -> None:
        """Call on_end once for each callback that was started; after one raises, the others get the status failed."""
        self._run._step = self._run.state.step
        failure: Exception | None = None
        while self._started:
            try:
                self._started.popleft().on_end(self._run, status)
            except Exception as error:  # the user's code; the first failure counts
                failure, status = failure or error, "failed"
        if failure is not None:
            raise failure


def load_callbacks(names: Sequence[str], runs_dir: Path, root: Path) -> dict[str, Callback]:
    """Import and instantiate each callback, named module:Class.

    Args:
        runs_dir: the folder of runs, from which nothing is imported.
        root: the project folder.

    Raises:
        UserError: a callback is inside a run directory, cannot be imported or instantiated, is not a subclass of
            Callback, or has an unknown hook.
    """
    if names and not sys.warnoptions:  # by default Python shows them in __main__ only; here the user wrote the code
        warnings.filterwarnings("default", r"utils\.[\w.]+ is deprecated", DeprecationWarning)
    callbacks: dict[str, Callback] = {}
    for name in names:
        module, _, attribute = name.partition(":")
        if name in callbacks:
            raise UserError(f"callbacks: {name} is listed twice")
        check_callback_place(name, runs_dir, root)
        try:
            found = getattr(_up_to_date(module), attribute)
            if not (isinstance(found, type) and issubclass(found, Callback)):
                raise UserError(f"callbacks: {name} is not a subclass of workbench.Callback")
            methods = [name for name in dir(found) if name.startswith("on_") and callable(getattr(found, name))]
            for wrong in (method for method in methods if method not in HOOKS):
                raise UserError(
                    f"callbacks: {name} has a method {wrong}, which nothing calls: expected {', '.join(HOOKS)}"
                    f"{nearest(wrong, HOOKS)}"
                )
            callbacks[name] = found()
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise UserError(f"callbacks: {name} cannot be used: {_in_one_line(error)}") from error
    return callbacks


def _up_to_date(name: str) -> ModuleType:
    """Import a module, again if its file has changed since an earlier run of this process, as it may in a notebook.

    Otherwise the run would record the present file but call the code of the earlier one.
    """
    module = importlib.import_module(name)
    if is_edited(name) and name != "__main__":  # a script cannot be imported again, which the record of the code notes
        for own in [key for key, value in vars(module).items() if getattr(value, "__module__", None) == name]:
            delattr(module, own)  # reload would keep what the file no longer has
        try:
            importlib.reload(module)
        except BaseException:
            sys.modules.pop(name, None)  # otherwise the next attempt would take it for up to date
            raise
        is_edited(name)  # notes the reloaded file, so that it no longer counts as edited
    return module


def _in_one_line(error: BaseException) -> str:
    """The exception in one line, with the place in the user's code that raised it."""
    message = typed_line(error)
    not_own = ("<", __file__, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))  # "<frozen importlib...>"
    own = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(not_own)]
    return f"{message} ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else message
