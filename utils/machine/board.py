"""Notes that ranks leave for each other in the store of torchrun, and their signs of life."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
BEAT_SECONDS = 0.5  # between signs of life
GRACE_SECONDS = 10.0  # for rank 0 to notice that another has failed, before it is ended
HANGING_SECONDS = 1.0  # the same if the others have been waiting for rank 0
CLOSING_SECONDS = 25.0  # for rank 0 to close the run; then ranks that have not noticed are ended
ANSWER_SECONDS = 8.0  # for the store to answer; a host that is cut off receives nothing, not even an error


class Store(Protocol):
    """The methods of torch.distributed.Store that are used here."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...

    def add(self, key: str, amount: int) -> int: ...

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes: ...

    def wait(self, keys: list[str], timeout: timedelta) -> None: ...


class Board:
    """The messages that the ranks of a run exchange in addition to their tensors.

    A thread leaves a sign of life of this rank, with its progress, every BEAT_SECONDS. It also ends this process if
    another rank has failed and this one hangs and does not notice, or if the store cannot be reached, because a request
    to it would wait for days.

    Args:
        own: a connection to the store for the thread alone.

    count: the number of collective operations that this rank has begun.
    busy: above 0 while this rank does work that the others wait for without a time limit.
    noticed: whether this rank is ending by itself.
    gone: whether the store is gone, and with it torchrun.
    """

    def __init__(self, store: Store, rank: int, world_size: int, own: Store | None = None) -> None:
        self.rank, self.world_size = rank, world_size
        self.count, self.busy, self.noticed, self.gone = 0, 0, False, False
        self._shared, self._own = store, own or store
        self._thread: threading.Thread | None = None
        self._asked: float | None = None  # when a request of another thread began that is still unanswered
        self._stopped = threading.Event()
        self._beats: dict[int, tuple[str, float]] = {}  # by rank: the last sign of life, and when it was first seen
        self._changes: dict[int, int] = {}  # by rank: the number of new signs of life since `forget`

    def start(self) -> None:
        self.beat(0)
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._thread.start()

    @property
    def _store(self) -> Store:
        """The connection for the current thread: a thread that waits for an answer blocks all that share its own."""
        return self._own if threading.current_thread() is self._thread else self._shared

    def stop(self) -> None:
        self.noticed = True
        self._stopped.set()

    def post(self, name: str, value: Any) -> None:
        """Leave a note, which is JSON; does nothing if the store is gone."""
        self._ask(lambda: self._store.set(name, json.dumps(value)))

    def post_first(self, name: str, value: Any) -> bool:
        """Leave a note unless there is one already; returns False if there is another one."""
        found = self._ask(lambda: self._store.compare_set(name, "", json.dumps(value)))
        return found is None or found == json.dumps(value).encode()

    def read(self, name: str) -> Any:
        """The note of this name, or None."""
        found = self._ask(lambda: self._store.get(name) if self._store.check([name]) else None)
        return None if found is None else json.loads(found)

    def beat(self, number: int) -> None:
        """Leave a sign of life."""
        self.post(f"beat/{self.rank}", [number, self.count, self.busy])

    def _ask(self, question: Callable[[], T]) -> T | None:
        """The answer of the store; None once it is gone."""
        if self.gone:
            return None
        in_thread = threading.current_thread() is self._thread
        self._asked = self._asked if in_thread else time.monotonic()
        try:
            return question()
        except RuntimeError:
            self.gone = True
            return None
        finally:
            self._asked = self._asked if in_thread else None

    def _watch(self) -> None:
        number, failure, failed_at = 0, None, 0.0
        while not self._stopped.wait(BEAT_SECONDS):
            number += 1
            self.beat(number)
            self._ask(lambda: self._own.wait([f"beat/{self.rank}"], timedelta(seconds=ANSWER_SECONDS)))
            if self.gone:  # so is torchrun, and nothing would restart or end the ranks: all stop, with a checkpoint
                os.kill(os.getpid(), signal.SIGTERM)
                self._end_if_cut_off()
                return
            if failure is None and (failure := self.read("failure")) is not None:
                failed_at = time.monotonic()
            if failure is not None and not self.noticed and self._is_late(failure, time.monotonic() - failed_at):
                self.post(f"left/{self.rank}", True)
                os._exit(1)

    def _end_if_cut_off(self) -> None:
        """End this process if it waits for an answer of the store that never comes."""
        while not self._stopped.wait(BEAT_SECONDS):
            if self._asked is not None and time.monotonic() - self._asked > ANSWER_SECONDS:
                print(f"error: {self.cut_off}", file=sys.stderr, flush=True)
                os._exit(1)

    @property
    def cut_off(self) -> str:
        """The error if neither the store nor the other ranks answer."""
        return f"rank {self.rank} hears nothing from torchrun and the other ranks: its host is cut off, or theirs are"

    def _is_late(self, failure: Mapping[str, Any], seconds: float) -> bool:
        """Whether this rank must end because it has not noticed the note of a failure for `seconds`.

        Ranks other than 0 wait until rank 0 has closed the run, because torchrun sends it a signal once one has ended.
        """
        if self.rank == 0:
            return seconds > (HANGING_SECONDS if 0 in failure.get("late", []) else GRACE_SECONDS)
        return seconds > CLOSING_SECONDS or self.read("end") is not None

    def _look(self, ranks: Sequence[int]) -> None:
        """Read the signs of life of these ranks."""
        now = time.monotonic()
        for rank in ranks:
            seen = json.dumps(self.read(f"beat/{rank}"))
            if rank not in self._beats:
                self._beats[rank] = seen, now
            elif self._beats[rank][0] != seen:
                self._beats[rank] = seen, now
                self._changes[rank] = self._changes.get(rank, 0) + 1

    def silent(self, ranks: Sequence[int], seconds: float) -> list[int]:
        """Those of `ranks` from which this rank has seen no new sign of life for `seconds`."""
        self._look([rank for rank in ranks if rank != self.rank])
        now = time.monotonic()
        return [rank for rank in ranks if rank != self.rank and now - self._beats[rank][1] > seconds]

    def forget(self) -> None:
        """Forget all signs of life that were seen so far."""
        self._beats, self._changes = {}, {}

    def never_seen(self, ranks: Sequence[int]) -> list[int]:
        """Those of `ranks` without a new sign of life since `forget`."""
        return [rank for rank in ranks if not self._changes.get(rank)]

    def behind(self, count: int) -> list[int]:
        """The ranks that are not busy and have begun fewer than `count` collective operations."""
        found = []
        for rank in range(self.world_size):
            beat = self.read(f"beat/{rank}")
            if rank != self.rank and beat is not None and beat[1] < count and not beat[2]:
                found.append(rank)
        return found
