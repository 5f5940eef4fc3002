"""Continuous batching: one thread that lets texts join the running batch of their model between two steps.

The models take turns, one step each, because they share the processor. The prompt of a new text is computed between two
steps, one prompt at a time, so that running texts continue. A slow reader delays nobody: the engine hands pieces over
without waiting until they are read.
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

HAND_OVER_SECONDS = 0.04  # pieces are collected for so long, because each event costs 0.1 ms (docs/LOG.md)
LONGEST_WAIT = 60  # seconds in Retry-After


class QueueFullError(Exception):
    """The queue of a model is full. retry_after: seconds until there is probably room."""

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


class ModelQueue:
    """The running batch of a model, and the jobs that wait for a slot in it."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.waiting: deque[Job] = deque()
        self.counters = Counters()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting) or len(self.batch) > 0


class Engine:
    """Generates the texts of all models. `submit` and `cancel` may be called from any thread.

    Args:
        batches: the batch of each model, by the name of the model.
        most_waiting: jobs of a model that may wait for a slot.
        hand_over: called with new pieces, in the thread of the engine.
    """

    def __init__(
        self, batches: Mapping[str, Batch], most_waiting: int, hand_over: Callable[[Sequence[Delivery]], None]
    ) -> None:
        self.queues = {name: ModelQueue(batch) for name, batch in batches.items()}
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
        """End the engine; jobs that are not done fail."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def submit(self, model: str, jobs: Sequence[Job]) -> None:
        """Put jobs into the queue of a model, all or none.

        Raises:
            QueueFullError: there is no room for all of them.
        """
        queue = self.queues[model]
        with self._changed:
            free = queue.batch.slots - len(queue.batch)
            if len(queue.waiting) + len(jobs) > self._most_waiting + free:
                raise QueueFullError(len(queue.waiting), self._retry_after(queue))
            queue.waiting.extend(jobs)
            self._changed.notify()

    def most_at_once(self, model: str) -> int:
        """The number of jobs that may run and wait together."""
        return self._most_waiting + self.queues[model].batch.slots

    def cancel(self, model: str, jobs: Sequence[Job]) -> None:
        """Drop jobs that nobody waits for any more."""
        queue = self.queues[model]
        with self._changed:
            for job in jobs:
                job.cancelled = True
                if job in queue.waiting:
                    queue.waiting.remove(job)
                    queue.counters.cancelled += 1

    def _retry_after(self, queue: ModelQueue) -> int:
        """Seconds until the queue is empty, at the rate at which jobs have finished so far."""
        ended = queue.counters.finished / (time.monotonic() - self._began)
        return min(LONGEST_WAIT, max(1, math.ceil(len(queue.waiting) / ended))) if ended else 1

    @torch.inference_mode()
    def _work(self) -> None:
        while self._wait_for_work():
            for queue in self.queues.values():
                try:
                    self._turn(queue)
                except Exception as error:
                    self._fail(queue, queue.batch.clear(), _reported(error))
            self._pass_on()
        for queue in self.queues.values():
            self._fail(queue, [*queue.batch.clear(), *queue.waiting], "the server is shutting down")
            queue.waiting.clear()
        self._pass_on(at_once=True)

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do; returns False if the engine was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or any(queue.has_work for queue in self.queues.values()))
            return not self._closed

    def _turn(self, queue: ModelQueue) -> None:
        """Compute the prompt of one waiting job, then one step of the batch."""
        queue.counters.cancelled += queue.batch.drop_cancelled()
        newcomer = None
        with self._changed:
            if queue.waiting and queue.batch.has_room:
                newcomer = queue.waiting.popleft()
        if newcomer is not None:
            self._join(queue, newcomer)
        if len(queue.batch):
            queue.counters.steps += 1
            self._collect(queue, queue.batch.step())

    def _join(self, queue: ModelQueue, job: Job) -> None:
        queue.counters.prompt_tokens += len(job.prompt)
        try:
            delivered = queue.batch.join(job)
        except Exception as error:  # the batch is untouched, so its texts continue
            self._fail(queue, [job], f"on this prompt: {_reported(error)}")
            return
        queue.counters.first_tokens += 1
        queue.counters.first_token_seconds += time.perf_counter() - job.asked
        self._collect(queue, delivered)
        self._pass_on(at_once=True)

    def _collect(self, queue: ModelQueue, delivered: Sequence[Delivery]) -> None:
        for _, piece in delivered:
            queue.counters.generated_tokens += len(piece.tokens)
            queue.counters.finished += piece.finish is not None
            queue.counters.failed += piece.error is not None
        self._collected += delivered

    def _fail(self, queue: ModelQueue, jobs: Sequence[Job], reason: str) -> None:
        self._collect(queue, [Delivery(job, Piece(error=reason)) for job in jobs])

    def _pass_on(self, at_once: bool = False) -> None:
        """Hand the collected pieces over if they are due or one of them is the last of its text."""
        now = time.monotonic()
        due = at_once or now - self._handed_over >= HAND_OVER_SECONDS
        if self._collected and (due or any(piece.is_last for _, piece in self._collected)):
            collected, self._collected = self._collected, []
            self._handed_over = now
            self._hand_over(collected)


def _reported(error: Exception) -> str:
    """Print the traceback of a failure on stderr; returns the reason that clients get."""
    traceback.print_exception(error, file=sys.stderr)
    return "out of memory" if is_out_of_memory(error) else f"the model failed: {type(error).__name__}"
