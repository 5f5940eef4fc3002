"""How the ranks of one start find each other in torchrun's store."""

from __future__ import annotations

import time
import uuid

from utils.errors import RankError
from utils.machine.board import Store

MEETING_SECONDS = 60.0  # for all ranks to start


def meet(store: Store, rank: int, world_size: int, seconds: float = MEETING_SECONDS) -> str:
    """The number of this start, on which all its ranks agree.

    torchrun keeps its store when it starts ranks again, possibly a different set of them, and these must not read the
    notes of earlier ranks. The restart count (TORCHELASTIC_RESTART_COUNT) differs between hosts if one joined later. So
    rank 0 counts the starts and answers each rank that asks. A rank acknowledges its answer, because rank 0 may have
    answered a question that an earlier rank left in the store.

    Raises:
        RankError: a rank did not start in time.
    """
    until = time.monotonic() + seconds
    if rank:
        question = uuid.uuid4().hex
        store.set(f"question/{rank}", question)
        while not store.check([f"answer/{question}"]):
            _wait(until, f"rank {rank} is alone: rank 0 did not start within {seconds:.0f} s")
        start = store.get(f"answer/{question}").decode()
        store.set(f"here/{start}/{rank}", "1")
        return start
    start = str(store.add("starts", 1))
    answered: dict[int, bytes] = {}
    while absent := [other for other in range(1, world_size) if not store.check([f"here/{start}/{other}"])]:
        for other in absent:
            if store.check([f"question/{other}"]):
                asked = store.get(f"question/{other}")
                if answered.get(other) != asked:
                    store.set(f"answer/{asked.decode()}", start)
                    answered[other] = asked
        _wait(until, f"rank {absent[0]} did not start within {seconds:.0f} s")
    return start


def _wait(until: float, problem: str) -> None:
    if time.monotonic() > until:
        raise RankError(problem)
    time.sleep(0.02)
