"""Callbacks: classes of the user's own that training calls (docs/callbacks.md)."""

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

Log = Callable[[int, Mapping[str, float | torch.Tensor]], None]  # takes a step and its numbers


class TrainingRun:
    """What a callback may read and do.

    path: the run directory.
    state: model, optimizer, step, losses, ...: what training changes, and so may a callback.
    loss: of the batch of the last update, 0-dimensional, on the device; reading its value waits for the device.

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
        """Of this process among those that train the run (docs/ranks.md); each calls its own callbacks."""
        return self.state.ranks.rank

    def log(self, values: Mapping[str, float | torch.Tensor]) -> None:
        """Numbers by registered metric name; tensors stay on their device until the log is written.

        In on_step they belong to the update just done, so they stand at its step. Of several ranks, those of rank 0
        are logged.

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
    """Base class: override what you need. An exception ends the run as failed.

    on_start is called once before the first step of a session (`run.state.step` is not 0 if it resumes), on_step
    after each update, on_eval after each evaluation, on_end once when a session ends for
    any reason but SIGKILL and a second Ctrl-C.

    It belongs in a module of its own, so that a resumed run finds it again, and is named by the setting `callbacks`:
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
        """What a checkpoint must keep, as JSON; a resumed run continues with it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""


HOOKS = [name for name in vars(Callback) if name.startswith("on_")]


class Callbacks:
    """The callbacks of one run, called in the order of the setting."""

    def __init__(self, callbacks: Sequence[Callback], run: TrainingRun) -> None:
        self._callbacks, self._run = callbacks, run
        self._started: deque[Callback] = deque()  # and not ended

    def on_start(self) -> None:
        for callback in self._callbacks:
            self._started.append(callback)
            callback.on_start(self._run)
        self._clean_up()

    def on_step(self, step: int, loss: torch.Tensor) -> None:
        """Update `step` is done."""
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
        """Training goes on with dropout and without gradients, whatever hooks have left: eval mode, a backward pass."""
        model = self._run.state.model
        model.zero_grad(set_to_none=True)
        if not model.training:
            model.train()

    def on_end(self, status: str) -> None:
        """Call on_end of each callback that was started, once; after one raises, the others get the status failed."""
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
    """Import and make each callback, by its name module:Class.

    Args:
        runs_dir: the folder of the runs, from which nothing is imported.
        root: the project folder.

    Raises:
        UserError: it is inside a run directory, cannot be imported or made, is no Callback, or has an unknown hook.
    """
    if names and not sys.warnoptions:  # Python shows them for __main__ only, and here their reader is the author
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
    """The module, imported again if its file has changed since an earlier run of this process, as it may in a notebook.

    Otherwise the run would record the file as it is, and call the code as it was.
    """
    module = importlib.import_module(name)
    if is_edited(name) and name != "__main__":  # a script cannot be imported again: what is recorded says so
        for own in [key for key, value in vars(module).items() if getattr(value, "__module__", None) == name]:
            delattr(module, own)  # reload would keep what the file no longer has
        try:
            importlib.reload(module)
        except BaseException:
            sys.modules.pop(name, None)  # else the next attempt would take it for up to date
            raise
        is_edited(name)  # it is not, from now on
    return module


def _in_one_line(error: BaseException) -> str:
    """What went wrong, and where in the user's code."""
    message = typed_line(error)
    not_own = ("<", __file__, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))  # "<": built in
    own = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(not_own)]
    return f"{message} ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else message
