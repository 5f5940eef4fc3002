"""A rank that torchrun has started along with others: sums over ranks, a time limit on each wait, and a common end.

A rank that waits for others reads their notes and signs of life on the board (utils/machine/board.py). So a rank that
fails, dies or hangs is named in the error, and the others end, too.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any

import psutil
import torch
import torch.distributed as dist

from utils.errors import RankError, first_line
from utils.machine.board import Board
from utils.machine.meeting import MEETING_SECONDS, meet
from utils.machine.ranks import Ranks, RanksOverError, Work
from utils.machine.signals import StopSignal

POLL_SECONDS = 1.0  # how often a waiting rank checks on the others
SILENT_SECONDS = 3.0  # without a sign of life after a connection broke: then a rank is gone
LEAVE_SECONDS = 5.0  # for the other ranks to leave before rank 0
FOREVER = timedelta(days=1)  # torch's own time limits: ours are shorter, and name the rank


class ProcessRanks(Ranks):
    """A process that torchrun has started with others."""

    board: Board

    def __init__(self) -> None:
        from torch.distributed.rendezvous import rendezvous

        cuda = torch.cuda.is_available() and dist.is_nccl_available()
        store, rank, world_size = next(iter(rendezvous("env://", timeout=timedelta(seconds=MEETING_SECONDS))))
        super().__init__(
            rank, int(os.environ.get("LOCAL_RANK", rank)), world_size, "cpu:gloo,cuda:nccl" if cuda else "gloo"
        )
        if cuda and self.local_rank < torch.cuda.device_count():
            torch.cuda.set_device(self.local_rank)
        start = meet(dist.PrefixStore("workbench", store), rank, world_size)
        connections = [dist.PrefixStore(f"workbench/{start}", own_store(world_size)) for _ in range(2)]
        self.board = Board(connections[0], rank, world_size, connections[1])
        self.board.post(f"process/{rank}", [socket.gethostname(), os.getpid(), psutil.Process().create_time()])
        dist.init_process_group(
            self.backend,
            store=dist.PrefixStore(f"workbench/{start}/group", store),
            rank=rank,
            world_size=world_size,
            timeout=FOREVER,
        )
        self._pairs = self._make_pairs()
        self.board.busy = 1
        self.board.start()

    def _make_pairs(self) -> list[Any]:
        """The group of this rank and its partner, by level; empty unless world_size is a power of two."""
        pairs: list[Any] = []
        if self.world_size & (self.world_size - 1):
            return pairs
        for level in range(self.world_size.bit_length() - 1):
            for low in range(self.world_size):  # each rank takes part in making each group
                if not low >> level & 1:
                    members = [low, low | 1 << level]
                    group = dist.new_group(members, timeout=FOREVER)
                    if self.rank in members:
                        pairs.append(group)
        return pairs

    def share(self, name: str, value: Any) -> Any:
        if self.rank == 0:
            self.board.post(f"shared/{name}", value)
            return value
        return self._read(f"shared/{name}", 0)

    def collect(self, name: str, value: Any) -> list[Any]:
        if self.rank:
            self.board.post(f"collected/{name}/{self.rank}", value)
            return []
        return [value, *(self._read(f"collected/{name}/{rank}", rank) for rank in range(1, self.world_size))]

    def _read(self, name: str, of_rank: int) -> Any:
        """Wait for a note that another rank leaves when it gets that far, as long as that rank lives."""
        while (found := self.board.read(name)) is None:
            self._check()
            if self.board.gone:
                raise RankError(self.board.cut_off)
            self._check_alive([of_rank], max(self.seconds, SILENT_SECONDS))
            time.sleep(0.02)
        return found

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        tensors = [torch.empty_like(tensor) for _ in range(self.world_size)]
        self.wait(self._started(lambda: dist.all_gather(tensors, tensor.contiguous(), async_op=True)))
        return tensors

    def broadcast(self, tensor: torch.Tensor) -> None:
        if not tensor.numel():
            return
        with torch.no_grad():
            values = tensor.detach().contiguous()
            self.wait(self._started(lambda: dist.broadcast(values, 0, async_op=True)))
            if values.data_ptr() != tensor.data_ptr():
                tensor.copy_(values)

    def together(self, start: Callable[[], Any]) -> None:
        self.wait(self._started(start))

    def start_sum(self, tensor: torch.Tensor, level: int | None) -> Work:
        group, others = None if level is None else self._pairs[level], self.world_size - 1
        self.sent_bytes += tensor.nbytes if level is not None else 2 * tensor.nbytes * others // self.world_size
        return self._started(lambda: dist.all_reduce(tensor, group=group, async_op=True))

    def _started(self, start: Callable[[], Any]) -> Work:
        self.board.count += 1
        try:
            work: Work = start()
        except RuntimeError as error:
            raise self._explained(error) from error
        return work

    def wait(self, work: Work) -> None:
        count, began = self.board.count, time.monotonic()
        while True:
            try:
                work.wait(timedelta(seconds=POLL_SECONDS))
                return
            except RuntimeError as error:
                if "timed out" not in str(error).lower():
                    raise self._explained(error) from error
            self._check()
            waited = time.monotonic() - began
            if self.board.gone and waited > self.seconds:
                raise RankError(self.board.cut_off)
            self._check_alive(range(self.world_size), self.seconds)
            if waited > self.seconds and (late := self.board.behind(count)):
                if silent := self.board.silent(late, SILENT_SECONDS):
                    raise self._found(f"{names(silent)} gave no sign of life: stopped, or cut off")
                raise self._found(f"{names(late)} did not get as far as the others within {self.seconds:.0f} s", late)

    def _check(self) -> None:
        """Raise the error that another rank has left a note about: it has failed, or training is over."""
        if (failure := self.board.read("failure")) is not None and failure["rank"] != self.rank:
            who = "" if failure.get("found") else f"rank {failure['rank']}: "
            raise RankError(f"{who}{failure['message']}", failure.get("trace", ""))
        if self.rank and (over := self.board.read("over")) is not None:
            raise RanksOverError(over)

    def _check_alive(self, ranks: Sequence[int], seconds: float) -> None:
        """Raise RankError if one of the ranks has given no sign of life for `seconds`."""
        if (silent := self.board.silent(ranks, seconds)) and not self.board.gone:
            raise self._found(f"{names(silent)} gave no sign of life: stopped, or cut off")

    def _explained(self, error: RuntimeError) -> Exception:
        """The error that explains a broken connection: a rank left a note, or gives no more signs of life."""
        until = time.monotonic() + SILENT_SECONDS
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        self.board.forget()
        while time.monotonic() < until:
            try:
                self._check()
            except (RankError, RanksOverError) as explanation:
                return explanation
            self.board.silent(others, SILENT_SECONDS)  # reads the signs of life
            time.sleep(0.05)
        if self.board.gone:
            return RankError(self.board.cut_off)
        if silent := self.board.never_seen(others):
            return self._found(f"{names(silent)} died: killed, or cut off")
        return self._found(f"rank {self.rank} lost its connection: {first_line(error)}")

    def _found(self, message: str, late: Sequence[int] = ()) -> RankError:
        """The error that this rank has found; also leaves a note about it for the others.

        Args:
            late: the ranks that are alive, but hang.
        """
        self.board.post_first("failure", {"rank": self.rank, "message": message, "found": True, "late": list(late)})
        return RankError(message)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        self.board.busy += 1
        try:
            yield
        finally:
            self.board.busy -= 1

    def training_begins(self) -> None:
        self.board.busy = 0

    def dead(self) -> RankError | None:
        others = [rank for rank in range(1, self.world_size) if self.board.read(f"left/{rank}") is None]
        until = time.monotonic() + SILENT_SECONDS
        self.board.forget()
        while time.monotonic() < until and self.board.read("failure") is None and self.board.never_seen(others):
            self.board.silent(others, SILENT_SECONDS)  # reads the signs of life
            time.sleep(0.05)
        silent = self.board.never_seen(others)
        if not silent or self.board.gone or self.board.read("failure") is not None:
            return None
        return self._found(f"{names(silent)} died: killed, or cut off")

    def training_is_over(self, status: str, failure: str | None = None) -> None:
        self.board.noticed, self.board.busy = True, 1
        if failure is not None:
            self.board.post_first("failure", {"rank": self.rank, "message": failure, "found": True})
        self.board.post("over", status)

    def handle_signal(self, signum: int, _frame: FrameType | None) -> None:
        """Stop at once, unless this rank is ending already: torchrun sends a signal to all ranks once one has ended."""
        if not self.board.noticed:
            raise StopSignal(signum)

    def end_of_training(self) -> str:
        """On ranks other than 0: wait until rank 0 knows the status of the run, and return it."""
        self.board.busy = 1
        while (status := self.board.read("over")) is None and not self.board.gone:
            self._check()
            self._check_alive([0], self.seconds)
            time.sleep(0.02)
        return "interrupted" if status is None else str(status)

    def failed(self, message: str, trace: str) -> None:
        """On ranks other than 0: leave a note about a failure of this rank, which rank 0 reports."""
        self.board.noticed, self.board.busy = True, 1
        self.board.post_first("failure", {"rank": self.rank, "message": message, "trace": trace})

    def end(self, exit_status: int) -> None:
        """On rank 0: post the exit status, and let the others leave first: torchrun ends all once one has failed."""
        self.training_is_over("failed" if exit_status else "completed")
        self.board.post("end", exit_status)
        others, until = list(range(1, self.world_size)), time.monotonic() + LEAVE_SECONDS
        while others and time.monotonic() < until and not self.board.gone:
            others = [rank for rank in others if self.board.read(f"left/{rank}") is None]
            if exit_status and others == self.board.silent(others, SILENT_SECONDS):
                self._kill(others)
                break
            time.sleep(0.02)
        self._close(exit_status)

    def _kill(self, ranks: Sequence[int]) -> None:
        """Kill the processes of ranks that no longer respond; on other hosts torchrun does, 30 s after its signal."""
        for rank in ranks:
            host, pid, created = self.board.read(f"process/{rank}") or ("", 0, 0.0)
            with contextlib.suppress(psutil.Error):
                if host == socket.gethostname() and psutil.Process(pid).create_time() == created:
                    psutil.Process(pid).kill()

    def leave(self) -> int | None:
        """On ranks other than 0: wait for rank 0's exit status, and leave the group.

        Returns:
            The exit status; None if rank 0 is gone and this rank is the one to report that.
        """
        self.board.noticed, self.board.busy = True, 1
        try:
            while (status := self.board.read("end")) is None and not self.board.gone:
                if self.board.read("left/0") is not None or self.board.silent([0], LEAVE_SECONDS):
                    break
                time.sleep(0.02)
        finally:
            self.board.post(f"left/{self.rank}", True)
            reports = status is None and self.board.post_first("reporter", self.rank)
            if reports and self.board.silent([0], SILENT_SECONDS):
                self._kill([0])
            self._close(1 if status is None else int(status))
        return None if reports else 1 if status is None else int(status)

    def _close(self, exit_status: int) -> None:
        """Leave the group; after a failure, do not wait for sums, which a host that is cut off never sends."""
        self.board.stop()
        if exit_status:
            atexit.register(os._exit, exit_status)
            return
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def own_store(world_size: int) -> dist.Store:
    """A connection to torchrun's store in addition to torch's own."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=False,
        timeout=timedelta(seconds=MEETING_SECONDS),
        wait_for_workers=False,
    )


def names(ranks: Sequence[int]) -> str:
    """The ranks in words: "rank 1", "ranks 1 and 2"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
