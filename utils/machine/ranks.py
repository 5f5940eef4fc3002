"""Ranks: the processes that train one run together.

torchrun starts them (utils/machine/process_ranks.py). Rank 0 decides and writes; the others compute. Without torchrun
there is one rank, `ONE`, which communicates with nobody.

A sum of two numbers is the same in either order, and so is a sum of which all numbers but one are zero. Sums that must
be equal to the last bit consist of these two kinds alone: sums over pairs of ranks (`start_sum` with a level), and sums
of vectors that are zero outside a rank's own entries (`sum_exactly`).
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
    """A collective operation that has been started."""

    def wait(self, timeout: timedelta = ...) -> object: ...

    def is_completed(self) -> bool: ...


class RanksOverError(Exception):
    """Rank 0 has ended training while this rank was at work.

    status: the status of the run.
    """

    def __init__(self, status: str) -> None:
        super().__init__(f"rank 0 has ended training: {status}")
        self.status = status


@dataclass(eq=False)
class Ranks:
    """This process as one of the ranks of a run; this base class is a single rank.

    backend: the backend of torch.distributed.
    seconds: how long a rank waits for another one that is not busy.
    memory: the bytes that each rank can allocate at the start, the minimum over ranks; None: not measured.
    sent_bytes: the bytes that this rank has sent in sums so far; a sum over all ranks counts as a ring all-reduce.
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
        """Rank 0's `value` for `name` (JSON, but not null), on every rank; the `value` of other ranks is not used."""
        return value

    def collect(self, _name: str, value: Any) -> list[Any]:
        """On rank 0: each rank's `value` for `name` (JSON, but not null), by rank. On others: an empty list."""
        return [value]

    def sum_exactly(self, vector: torch.Tensor) -> torch.Tensor:
        """Sum vectors over ranks, in place. Each is zero outside its rank's own entries, so the sum is exact."""
        if self.several:
            self.wait(self.start_sum(vector, None))
        return vector

    def any_of(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.sum_exactly(torch.tensor([float(flag)])).item()) if self.several else flag

    def interleave(self, own: torch.Tensor, count: int) -> torch.Tensor:
        """All (count,) numbers, of which this rank has every world_size-th in `own`, starting with number `rank`."""
        full = own.new_zeros(count)
        full[self.rank :: self.world_size] = own
        return self.sum_exactly(full)

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks, which have the same shape, in the order of ranks."""
        return [tensor]

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Copy rank 0's values into the tensors of the others."""

    def start_sum(self, tensor: torch.Tensor, level: int | None) -> Work:
        """Start to add, in place, the tensors of this rank and its partner at a level, rank XOR 2**level.

        Without a level, those of all ranks are added. The sum is complete after `wait`.
        """
        raise AssertionError("one rank has nobody to add to")

    def wait(self, work: Work) -> None:
        """Wait for a sum.

        Raises:
            RankError: a rank has failed, is gone, or hangs. On rank 0, this is how the run fails.
            RanksOverError: rank 0 has ended training (on the other ranks only).
        """

    def together(self, start: Callable[[], Any]) -> None:
        """Start a collective operation of torch.distributed, in which all ranks take part, and wait for it."""
        raise AssertionError("one rank has nobody to do it with")

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """A context for work of this rank alone that may take any time: the others wait for it without a limit."""
        yield

    def training_begins(self) -> None:
        """Called when training begins: from then on the ranks keep in step; before, they count as busy."""

    def dead(self) -> RankError | None:
        """The error about a rank that died before training began, if that is why torchrun sent this one a signal."""
        return None

    def training_is_over(self, status: str, failure: str | None = None) -> None:
        """On rank 0: announce how training has ended, so that the other ranks end theirs.

        Args:
            status: the status of the run.
            failure: what has failed, with the name of the rank.
        """


ONE = Ranks()
