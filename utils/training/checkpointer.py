"""When to save, which checkpoints to keep, and the thread that writes them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from utils.checkpoints.choose import prune, remove_leftovers
from utils.checkpoints.files import write_base, write_checkpoint
from utils.checkpoints.folder import (
    BEST_FILE,
    LATEST_FILE,
    folder_name,
    list_checkpoints,
    read_pointer,
)
from utils.config.settings import TrainConfig
from utils.files import write_json
from utils.machine.device import synchronize
from utils.nn.lora import frozen_weights
from utils.runs.log import RunLog
from utils.runs.metrics import decode_number, encode_number
from utils.training.state import TrainState, capture

FIRST_GUESS_BYTES_PER_SECOND = 1e8  # assumed speed of the disk until the first checkpoint is written


class HostMemory:
    """Copies of tensors in host memory, which is reused every time.

    New memory would have to be faulted in, which takes longer than the copy.
    """

    def __init__(self) -> None:
        self._copies: dict[str, torch.Tensor] = {}

    def copy(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Host copies of `tensors`; the copies of the previous call are overwritten."""
        gpus = set()  # whose copies are under way
        result = {}
        for name, tensor in tensors.items():
            copy = self._copies.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                on_cuda = tensor.device.type == "cuda"
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_cuda)
            copy.copy_(tensor.detach(), non_blocking=tensor.device.type == "cuda")
            if tensor.device.type == "cuda":
                gpus.add(tensor.device)
            result[name] = copy
        for device in gpus:
            synchronize(device)
        self._copies = result
        return result


class Checkpointer:
    """Saves the checkpoints of one run.

    The training loop waits only for a copy to host memory; a thread writes the files, one checkpoint at a time. A
    checkpoint that is due while another is still being written is postponed. A failed write is reported, and the
    earlier checkpoints stay.

    Args:
        folder: artifacts/checkpoints of the run directory.
        settings: how often to save, and what to keep.
        log: its offsets go into the checkpoint, and it is synced before the checkpoint is complete.
        warn: prints one line to the user.
        saved_step: the step that the run resumes from, which is saved already; None: a new run.
        base: the manifest's entry for the frozen weights; None: they are not written yet, or there are none.
    """

    def __init__(
        self,
        folder: Path,
        settings: TrainConfig,
        config_hash: str,
        log: RunLog,
        warn: Callable[[str], None],
        saved_step: int | None = None,
        base: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.settings, self.config_hash, self.log = folder, settings, config_hash, log
        self._warn = warn
        self._weights, self._optimizer = HostMemory(), HostMemory()
        self._last_step = self._written_step = saved_step  # they differ during a write and after a failed one
        self._base = base
        remove_leftovers(folder)
        self._last_time = time.monotonic()
        self._thread: threading.Thread | None = None
        self._write_seconds: float | None = None
        self._was_suspended = self._is_abandoned = False
        self._failure: tuple[int, str] | None = None  # the step and the reason, if the last write failed

    @property
    def unsaved(self) -> str | None:
        """The newest checkpoint and why there is no later one, in words; None if the last write succeeded."""
        if self._failure is None:
            return None
        (step, reason), newest = self._failure, self._newest()
        found = f"none, not even of step {step:,}" if newest is None else f"of step {newest:,}, not {step:,}"
        return f"{found}: {reason}"

    def _newest(self) -> int | None:
        """The step of the newest checkpoint; None if there is none."""
        return next((step for step, _ in list_checkpoints(self.folder)), None)

    def due(self, step: int) -> bool:
        """Whether checkpoint_interval or checkpoint_minutes calls for a checkpoint and none is being written."""
        if step == self._last_step or (self._thread is not None and self._thread.is_alive()):
            return False
        interval, minutes = self.settings.checkpoint_interval, self.settings.checkpoint_minutes
        by_steps = bool(interval) and step // interval > (self._last_step or 0) // interval
        by_time = minutes is not None and time.monotonic() - self._last_time >= 60 * minutes
        return by_steps or by_time

    def save(self, state: TrainState) -> None:
        """Wait for the previous write, then copy the state and start to write it, unless this step is saved already."""
        self.wait()
        if state.step == self._written_step:
            # A process that was killed may not have written them.
            self._write_pointers(state.step, state.best_step, state.best_val_loss)
            return
        weights, optimizer, facts = capture(state)
        facts |= {
            "config_hash": self.config_hash,
            "log_offsets": self.log.offsets(),
            "time": round(time.time(), 4),
        }
        frozen = frozen_weights(state.model) if self._base is None else {}
        arguments = (
            state.step,
            {name: tensor.cpu() for name, tensor in frozen.items()},  # no copy on the CPU: nothing changes them
            self._weights.copy(weights),
            self._optimizer.copy(optimizer),
            state.corpus.tokenizer.to_json(),
            facts,
        )
        self._last_step, self._last_time = state.step, time.monotonic()
        # A daemon, so that a second Ctrl-C ends the process at once: that leaves a temporary folder, never half a
        # checkpoint.
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until no checkpoint is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def abandon(self) -> None:
        """Do not complete the checkpoint that is being written: another process may train the run from now on."""
        self._is_abandoned = True

    def seconds_to_save(self, state: TrainState) -> float:
        """How long a checkpoint may take, in seconds, with a margin."""
        if self._write_seconds is None:  # estimated once, since this is called at every step
            weights = sum(p.numel() * p.element_size() for p in state.model.parameters())
            self._write_seconds = 1.5 * weights / FIRST_GUESS_BYTES_PER_SECOND
        return 1.0 + 2 * self._write_seconds

    def continued(self) -> None:
        """Note that the process was suspended, so that the time of a write in progress is not used as an estimate."""
        self._was_suspended = True

    def _write(
        self,
        step: int,
        frozen: Mapping[str, torch.Tensor],
        weights: Mapping[str, torch.Tensor],
        optimizer: Mapping[str, torch.Tensor],
        tokenizer: Mapping[str, Any],
        facts: Mapping[str, Any],
    ) -> None:
        began, self._was_suspended = time.monotonic(), False
        try:
            self.log.metrics.check_place()  # otherwise mkdir would make a deleted run directory again
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / folder_name(step)
            if frozen:
                self._base = write_base(self.folder, frozen)
            self._write_files(path, weights, optimizer, tokenizer, facts)
            self._written_step, self._failure = step, None
        except Exception as error:  # the boundary of the thread: training continues with the earlier checkpoints
            if not self._is_abandoned:
                with contextlib.suppress(OSError):
                    self._report_failure(step, error)
        else:
            self._prune(facts["best_step"] if self.settings.keep_best else None)
            self._write_pointers(step, facts["best_step"], decode_number(facts["best_val_loss"]))
        if not self._was_suspended:
            self._write_seconds = time.monotonic() - began

    def _write_files(
        self,
        path: Path,
        weights: Mapping[str, torch.Tensor],
        optimizer: Mapping[str, torch.Tensor],
        tokenizer: Mapping[str, Any],
        facts: Mapping[str, Any],
    ) -> None:
        write_checkpoint(path, weights, optimizer, tokenizer, facts, self._complete, self._base)

    def _complete(self) -> None:
        """Called before the last file of a checkpoint is written: sync the log, or raise if the run was abandoned."""
        if self._is_abandoned:
            raise InterruptedError("its run has ended")
        self.log.sync()

    def _prune(self, best_step: int | None) -> None:
        try:
            prune(self.folder, self.settings.keep_last, best_step)
        except OSError as error:
            self._warn(f"{self.folder}: the older checkpoints were not deleted: {reason_of(error)}")

    def _report_failure(self, step: int, error: Exception) -> None:
        """Warn once that a checkpoint was not written, and say which is the newest one."""
        before, self._failure = self._failure, (step, reason_of(error))
        if self._failure == before:
            return  # the last step may be tried twice: as the best one, and as the last
        newest = self._newest()
        found = "there is none" if newest is None else f"the newest is of step {newest:,}"
        self._warn(f"the checkpoint of step {step:,} was not written: {reason_of(error)}; {found}")

    def _write_pointers(self, step: int, best_step: int | None, best_val_loss: float) -> None:
        """Bring latest.json and best.json up to date; each is written only if it changes."""
        pointers: dict[str, dict[str, Any]] = {LATEST_FILE: {"step": step, "folder": folder_name(step)}}
        if self.settings.keep_best and best_step is not None and (self.folder / folder_name(best_step)).is_dir():
            best = {"step": best_step, "folder": folder_name(best_step), "val/loss": encode_number(best_val_loss)}
            pointers[BEST_FILE] = best
        try:
            for name, content in pointers.items():
                if read_pointer(self.folder / name) != content:
                    write_json(self.folder / name, content)
        except OSError as error:
            self._warn(
                f"{self.folder}: the pointers were not written: {reason_of(error)}; the checkpoints are complete"
            )


def reason_of(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
