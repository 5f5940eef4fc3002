"""How the ranks of one start find each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from utils.errors import RankError
from utils.machine.meeting import meet


def test_ranks_agree_whatever_an_earlier_start_left_behind() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as pool:
        for number, world_size in enumerate((3, 2, 3), 1):
            store.set("question/1", f"of a rank that died while it started, {number}")
            found = list(pool.map(lambda rank, size=world_size: meet(store, rank, size, 20.0), range(world_size)))
            assert found == [str(number)] * world_size


@pytest.mark.parametrize(
    ("rank", "message"), [(0, "rank 1 did not start within 0 s"), (1, "rank 1 is alone: rank 0 did not start")]
)
def test_a_missing_rank_is_named(rank: int, message: str) -> None:
    with pytest.raises(RankError, match=message):
        meet(dist.HashStore(), rank, 2, 0.1)
