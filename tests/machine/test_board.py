"""When a rank that does not notice the end of the others is ended, and why."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch.distributed as dist

from utils.machine import board as board_module
from utils.machine.board import Board


@pytest.mark.parametrize(
    ("rank", "failure", "ended"),
    [
        (0, {"message": "rank 0 did not get as far as the others", "late": [0]}, True),
        (0, {"message": "rank 1: ValueError: boom"}, False),  # it may be busy, and will notice later
        (1, {"message": "rank 1 did not get as far as the others", "late": [1]}, False),  # rank 0 closes the run first
    ],
)
def test_rank_0_is_ended_at_once_if_the_others_have_waited_for_it(
    rank: int, failure: dict[str, Any], ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hang must end within 30 s, of which the others have waited for 20."""
    left = threading.Event()

    def leave(status: int) -> None:
        left.set()
        board.stop()

    monkeypatch.setattr(board_module, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(board_module, "HANGING_SECONDS", 0.02)
    monkeypatch.setattr(os, "_exit", leave)
    board = Board(dist.HashStore(), rank, 2)
    board.post("failure", failure)
    board.start()
    assert left.wait(10.0 if ended else 0.1) == ended
    board.stop()
    assert (board.read(f"left/{rank}") is not None) == ended
