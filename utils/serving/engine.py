"""Continuous batching: one thread that lets texts join the running batch of their model between two steps.

The models take turns, a step each, because they share the processor. A newcomer's prompt is computed between two steps,
one prompt at a time, so that running texts go on. Who reads slowly keeps nobody waiting: pieces are handed over and not
waited for.
"""

from __future__ import annotations

import math
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from utils.errors import is_out_of_memory
from utils.serving.batch import Batch, Delivery
from utils.serving.sequence import Job, Piece

HAND_OVER_SECONDS = 0.04  # that pieces are collected for: each event costs the processor 0.1 ms (docs/LOG.md)
LONGEST_WAIT = 60  # seconds of Retry-After


class QueueFullError(Exception):
    """As many texts as allowed are waiting. retry_after: seconds until there is probably room."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting:,} texts are waiting already; try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass
class Counters:
    """What the engine has done for a model since it started.

    first_token_seconds: time from the request to the first piece, summed over `first_tokens` jobs.
    """

    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    first_tokens: int = 0
    first_token_seconds: float = 0.0


class Lane:
    """A model with its batch, and the jobs that wait for a slot."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.waiting: deque[Job] = deque()
        self.counters = Counters()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting) or len(self.batch) > 0


class Engine:
    """Generates for all who ask. `submit` and `cancel` may be called from any thread.

    Args:
        batches: of each model, by name.
        most_waiting: jobs of a model that may wait for a slot.
        hand_over: takes the pieces, in the thread of the engine.
    """

    def __init__(
        self, batches: Mapping[str, Batch], most_waiting: int, hand_over: Callable[[Sequence[Delivery]], None]
    ) -> None:
        self.lanes = {name: Lane(batch) for name, batch in batches.items()}
        self._most_waiting, self._hand_over = most_waiting, hand_over
        self._changed = threading.Condition()
        self._closed = False
        self._collected: list[Delivery] = []
        self._handed_over = 0.0
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """End: jobs that are not done fail."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def submit(self, model: str, jobs: Sequence[Job]) -> None:
        """Let jobs wait for their turn, all or none.

        Raises:
            QueueFullError: too many are waiting.
        """
        lane = self.lanes[model]
        with self._changed:
            free = lane.batch.slots - len(lane.batch)
            if len(lane.waiting) + len(jobs) > self._most_waiting + free:
                raise QueueFullError(len(lane.waiting), self._retry_after(lane))
            lane.waiting.extend(jobs)
            self._changed.notify()

    def most_at_once(self, model: str) -> int:
        """Jobs that may run and wait together."""
        return self._most_waiting + self.lanes[model].batch.slots

    def cancel(self, model: str, jobs: Sequence[Job]) -> None:
        """Forget jobs whose reader has gone."""
        lane = self.lanes[model]
        with self._changed:
            for job in jobs:
                job.cancelled = True
                if job in lane.waiting:
                    lane.waiting.remove(job)
                    lane.counters.cancelled += 1

    def _retry_after(self, lane: Lane) -> int:
        """Seconds until the queue is empty at the rate at which jobs have ended so far."""
        ended = lane.counters.finished / (time.monotonic() - self._began)
        return min(LONGEST_WAIT, max(1, math.ceil(len(lane.waiting) / ended))) if ended else 1

    @torch.inference_mode()
    def _work(self) -> None:
        while self._wait_for_work():
            for lane in self.lanes.values():
                try:
                    self._turn(lane)
                except Exception as error:
                    self._fail(lane, lane.batch.clear(), _reported(error))
            self._pass_on()
        for lane in self.lanes.values():
            self._fail(lane, [*lane.batch.clear(), *lane.waiting], "the server is shutting down")
            lane.waiting.clear()
        self._pass_on(at_once=True)

    def _wait_for_work(self) -> bool:
        """Returns once there is something to do; False: the engine is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or any(lane.has_work for lane in self.lanes.values()))
            return not self._closed

    def _turn(self, lane: Lane) -> None:
        """The prompt of one newcomer, and a step of all."""
        lane.counters.cancelled += lane.batch.drop_cancelled()
        newcomer = None
        with self._changed:
            if lane.waiting and lane.batch.has_room:
                newcomer = lane.waiting.popleft()
        if newcomer is not None:
            self._join(lane, newcomer)
        if len(lane.batch):
            lane.counters.steps += 1
            self._collect(lane, lane.batch.step())

    def _join(self, lane: Lane, job: Job) -> None:
        lane.counters.prompt_tokens += len(job.prompt)
        try:
            delivered = lane.batch.join(job)
        except Exception as error:  # those in the batch go on: nothing of theirs has been touched
            self._fail(lane, [job], f"on this prompt: {_reported(error)}")
            return
        lane.counters.first_tokens += 1
        lane.counters.first_token_seconds += time.perf_counter() - job.asked
        self._collect(lane, delivered)
        self._pass_on(at_once=True)

    def _collect(self, lane: Lane, delivered: Sequence[Delivery]) -> None:
        for _, piece in delivered:
            lane.counters.generated_tokens += len(piece.tokens)
            lane.counters.finished += piece.finish is not None
            lane.counters.failed += piece.error is not None
        self._collected += delivered

    def _fail(self, lane: Lane, jobs: Sequence[Job], reason: str) -> None:
        self._collect(lane, [Delivery(job, Piece(error=reason)) for job in jobs])

    def _pass_on(self, at_once: bool = False) -> None:
        """Hand the collected pieces over, if it is time."""
        now = time.monotonic()
        due = at_once or now - self._handed_over >= HAND_OVER_SECONDS
        if self._collected and (due or any(piece.is_last for _, piece in self._collected)):
            collected, self._collected = self._collected, []
            self._handed_over = now
            self._hand_over(collected)


def _reported(error: Exception) -> str:
    """What clients learn of a failure, whose traceback goes to stderr."""
    traceback.print_exception(error, file=sys.stderr)
    return "out of memory" if is_out_of_memory(error) else f"the model failed: {type(error).__name__}"
