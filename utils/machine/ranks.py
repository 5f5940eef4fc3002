"""Ranks: the processes that train one run together.

torchrun starts them (utils/machine/process_ranks.py). Rank 0 decides and writes; the others compute. Without torchrun
there is one rank, `ONE`, which communicates with nobody.

A sum of two numbers is the same in either order, and a sum in which all but one number are zero is that number in any
order. All that must be equal to the last bit is made of these two: pairs of ranks (`start_sum` with a level), and
vectors that are zero outside a rank's own entries (`sum_exactly`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch

from utils.errors import RankError


class Work(Protocol):
    """A sum that has been started."""

    def wait(self, timeout: timedelta = ...) -> object: ...

    def is_completed(self) -> bool: ...


class RanksOverError(Exception):
    """Rank 0 has ended training while this rank was at work.

    status: of the run.
    """

    def __init__(self, status: str) -> None:
        super().__init__(f"rank 0 has ended training: {status}")
        self.status = status


@dataclass(eq=False)
class Ranks:
    """This process among the ranks of a run; by itself, a single one.

    backend: of torch.distributed.
    seconds: that a rank waits for another which is not busy.
    memory: bytes that each rank can allocate at the start, of the rank that has least; None: nobody has asked.
    sent_bytes: in sums, so far, by this rank; those of all ranks go round a ring.
    """

    rank: int = 0
    local_rank: int = 0  # on this machine
    world_size: int = 1
    backend: str = "none"
    seconds: float = 20.0
    memory: int | None = None
    sent_bytes: int = 0

    @property
    def several(self) -> bool:
        return self.world_size > 1

    def share(self, _name: str, value: Any) -> Any:
        """What rank 0 calls `name`: JSON, but not null; `value` counts on rank 0 only."""
        return value

    def collect(self, _name: str, value: Any) -> list[Any]:
        """On rank 0: what each rank calls `name`, JSON but not null, in their order. On others: an empty list."""
        return [value]

    def sum_exactly(self, vector: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of vectors that are zero outside a rank's own entries, in place, so it is exact."""
        if self.several:
            self.wait(self.start_sum(vector, None))
        return vector

    def any_of(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.sum_exactly(torch.tensor([float(flag)])).item()) if self.several else flag

    def interleave(self, own: torch.Tensor, count: int) -> torch.Tensor:
        """(count,) numbers of which each rank has every world_size-th, from its own number on."""
        full = own.new_zeros(count)
        full[self.rank :: self.world_size] = own
        return self.sum_exactly(full)

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks, which have one shape, in their order."""
        return [tensor]

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Copy rank 0's values into the tensors of the others."""

    def start_sum(self, tensor: torch.Tensor, level: int | None) -> Work:
        """Start to add, in place, the tensors of this rank and its partner of a level, rank XOR 2**level; None: of all.

        The sum exists once it was waited for (`wait`).
        """
        raise AssertionError("one rank has nobody to add to")

    def wait(self, work: Work) -> None:
        """Wait for a sum.

        Raises:
            RankError: a rank has failed, is gone, or hangs. On rank 0 its message is that of the run.
            RanksOverError: not on rank 0, which has ended training.
        """

    def together(self, start: Callable[[], Any]) -> None:
        """Do what all ranks do at once, an operation of torch.distributed that `start` starts, and wait for it."""
        raise AssertionError("one rank has nobody to do it with")

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Around work that this rank alone does, and that may take any time: the others wait for it without a limit."""
        yield

    def training_begins(self) -> None:
        """From now on the ranks keep in step; until then they are busy."""

    def dead(self) -> RankError | None:
        """Another rank that died before training began, for which torchrun sent this one a signal."""
        return None

    def training_is_over(self, status: str, failure: str | None = None) -> None:
        """On rank 0: how its training has ended, for the others, which end theirs.

        Args:
            failure: what has failed, with the name of the rank.
        """


ONE = Ranks()
