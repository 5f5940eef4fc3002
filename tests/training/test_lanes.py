"""Updates in lanes: the same bits whatever the number of ranks, which are threads here."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn

from utils.machine.ranks import Ranks
from utils.training.lanes import GradientSum, Tree, lane_seed, tree_sum


@dataclass
class Meeting:
    """Where ranks that are threads add their tensors."""

    world_size: int
    parts: dict[Any, list[torch.Tensor]] = field(default_factory=dict)
    lock: threading.Condition = field(default_factory=threading.Condition)


class Sum:
    """A sum that exists once all members have started it."""

    def __init__(self, meeting: Meeting, key: Any, members: int, tensor: torch.Tensor) -> None:
        self.meeting, self.key, self.members, self.tensor = meeting, key, members, tensor
        with meeting.lock:
            meeting.parts.setdefault(key, []).append(tensor.clone())
            meeting.lock.notify_all()

    def wait(self, timeout: timedelta = timedelta()) -> None:
        with self.meeting.lock:
            assert self.meeting.lock.wait_for(lambda: len(self.meeting.parts[self.key]) == self.members, 30)
        first, *others = self.meeting.parts[self.key]  # in the order of arrival: any
        total = first.clone()
        for other in others:
            total += other
        self.tensor.copy_(total)

    def is_completed(self) -> bool:
        return len(self.meeting.parts[self.key]) == self.members


@dataclass
class ThreadRanks(Ranks):
    meeting: Meeting = field(default_factory=lambda: Meeting(1))
    counts: dict[Any, int] = field(default_factory=dict)

    def start_sum(self, tensor: torch.Tensor, level: int | None) -> Sum:
        group = (None,) if level is None else (level, self.rank & ~(1 << level))
        number = self.counts[group] = self.counts.get(group, 0) + 1
        members = self.world_size if level is None else 2
        return Sum(self.meeting, (*group, number), members, tensor)

    def wait(self, work: Any) -> None:
        work.wait()


def on_ranks(world_size: int, action: Callable[[Ranks], Any]) -> list[Any]:
    """What `action` returns on each of several ranks."""
    meeting = Meeting(world_size)
    ranks = [ThreadRanks(rank, rank, world_size, "threads", meeting) for rank in range(world_size)]
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(action, ranks))


def reference(values: list[torch.Tensor]) -> torch.Tensor:
    """((0 + 1) + (2 + 3)), by recursion."""
    half = len(values) // 2
    return values[0] if not half else reference(values[:half]) + reference(values[half:])


@pytest.mark.parametrize("lanes", [1, 2, 4, 8])
def test_lanes_are_added_in_one_binary_tree(lanes: int) -> None:
    values = [10.0 ** torch.randn(1000) for _ in range(lanes)]  # in another order the last bits differ
    tree = Tree()
    for value in values[:-1]:
        tree.add([value.clone()])
    found = tree.with_last(0, values[-1].clone())
    assert found is not None
    assert torch.equal(found, reference(values))
    assert torch.equal(tree_sum(torch.stack(values)[:, 0]), found[0])
    assert len(tree._sums) <= lanes.bit_length()
    if lanes == 8:
        assert not torch.equal(found, sum(values[1:], values[0]))


def gradients_of(ranks: Ranks, lanes: int, skipped: dict[int, set[int]], bucket: int) -> list[torch.Tensor | None]:
    """The gradients of three parameters over lanes, of which some have none."""
    generator = torch.Generator().manual_seed(1)
    parameters = [nn.Parameter(torch.zeros(n)) for n in (5, 70, 3)]
    values = [[10.0 ** torch.randn(len(p), generator=generator) for p in parameters] for _ in range(lanes)]
    for of_lane in values:
        of_lane[0][0] = -0.0
    total = GradientSum(parameters, ranks, exact=True) if ranks.several else None
    tree, own = Tree(), lanes // ranks.world_size
    for lane in range(ranks.rank * own, (ranks.rank + 1) * own):
        used = [i for i in range(3) if i not in skipped.get(lane, set())]
        is_last = lane == (ranks.rank + 1) * own - 1
        if is_last and total is not None:
            total.begin(tree)
        loss = sum((parameters[i] * values[lane][i]).sum() for i in used)
        if isinstance(loss, torch.Tensor):
            loss.backward()
        if is_last:
            break
        tree.add([p.grad for p in parameters])
        for p in parameters:
            p.grad = None
    if total is None:
        return [tree.with_last(i, p.grad) for i, p in enumerate(parameters)]
    total.finish()
    return [p.grad for p in parameters]


@pytest.mark.parametrize(
    "skipped",
    [{}, {0: {0}}, {3: {0, 1}}, {7: {0, 1, 2}}, {lane: {1} for lane in range(8)}, {0: {0, 1}, 1: {0, 2}, 6: {2}}],
)
def test_ranks_add_what_one_rank_adds(skipped: dict[int, set[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter without a gradient in a lane counts as zeros; without one in any lane it has none."""
    monkeypatch.setattr("utils.training.lanes.BUCKET_BYTES", 64)
    alone = gradients_of(Ranks(), 8, skipped, 64)
    for world_size in (2, 4, 8):
        for found in on_ranks(world_size, lambda ranks: gradients_of(ranks, 8, skipped, 64)):
            for one, other in zip(alone, found, strict=True):
                assert (one is None) == (other is None)
                if one is not None and other is not None:
                    assert torch.equal(one.view(torch.int32), other.view(torch.int32))  # -0.0 is not 0.0


def test_each_micro_step_has_random_numbers_of_its_own() -> None:
    seeds = {lane_seed(*place) for place in itertools.product((0, 1), range(50), range(8))}
    assert len(seeds) == 2 * 50 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)
