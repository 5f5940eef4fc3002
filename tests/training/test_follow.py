"""How a rank other than rank 0 ends when rank 0 is gone and cannot report anything."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from utils.errors import RankError
from utils.machine import process_ranks
from utils.machine.board import Board
from utils.machine.process_ranks import ProcessRanks
from utils.machine.ranks import Ranks, RanksOverError
from utils.machine.signals import StopSignal
from utils.training.follow import run_other_rank


@pytest.fixture
def rank_1(monkeypatch: pytest.MonkeyPatch) -> ProcessRanks:
    """Rank 1 of two; rank 0 has given no sign of life."""
    monkeypatch.setattr(process_ranks, "LEAVE_SECONDS", 0.01)
    monkeypatch.setattr(process_ranks, "SILENT_SECONDS", 0.01)
    monkeypatch.setattr(ProcessRanks, "_close", lambda self, exit_status: None)
    ranks = ProcessRanks.__new__(ProcessRanks)
    Ranks.__init__(ranks, 1, 1, 2, "gloo")
    ranks.board = Board(dist.HashStore(), 1, 2)
    return ranks


def facts() -> dict[str, Any]:
    return {"settings": {"device": "cpu"}}


def raises(error: BaseException) -> Callable[[ProcessRanks], None]:
    def work(_: ProcessRanks) -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (raises(ValueError("boom")), "rank 1: ValueError: boom"),
        (raises(RankError("rank 0 died: killed, or cut off")), "rank 0 died: killed, or cut off"),
        (raises(StopSignal(signal.SIGTERM)), "rank 0 gave no sign of life: killed, stopped, or cut off"),
        (raises(RanksOverError("completed")), "rank 0 gave no sign of life: killed, stopped, or cut off"),
        (lambda _: None, "rank 0 gave no sign of life: killed, stopped, or cut off"),
    ],
)
def test_a_rank_that_is_left_alone_says_why(
    rank_1: ProcessRanks, work: Callable[[ProcessRanks], None], message: str
) -> None:
    with pytest.raises(RankError) as caught:
        run_other_rank(facts, rank_1, work)
    assert str(caught.value) == message


def test_nothing_is_reported_twice(rank_1: ProcessRanks) -> None:
    """Another rank reports, torchrun is gone and all ranks stop on their own, or rank 0 has left its exit status."""
    rank_1.board.post("reporter", 2)
    assert run_other_rank(facts, rank_1, raises(ValueError("boom"))) == 1
    rank_1.board.gone = True
    assert run_other_rank(facts, rank_1, raises(StopSignal(signal.SIGTERM))) == 128 + signal.SIGTERM
    rank_1.board.gone = False
    rank_1.board.post("end", 3)
    assert run_other_rank(facts, rank_1, raises(ValueError("boom"))) == 3


def test_a_rank_does_not_wait_for_rank_0_once_it_has_left(
    rank_1: ProcessRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_ranks, "LEAVE_SECONDS", 1000.0)
    rank_1.board.post("left/0", True)
    with pytest.raises(RankError, match="rank 0 did not get as far"):
        run_other_rank(facts, rank_1, raises(RankError("rank 0 did not get as far as the others within 20 s")))
