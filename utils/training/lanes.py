"""Updates in lanes: fixed slices of the global batch, whose gradients are added in one binary tree.

Lane i has the i-th slice, whichever rank computes it. The sum of 4 lanes is (0 + 1) + (2 + 3). Of L lanes, rank r of W
computes lanes r L / W to (r + 1) L / W - 1, which are a subtree, and adds the rest of the tree with one partner per
level (recursive doubling [Thakur et al. 2005, Optimization of Collective Communication Operations in MPICH]). So 1, 2,
4, ... ranks add the same numbers in the same order and get the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from utils.machine.ranks import Ranks, Work
from utils.optim.muon import Muon, newton_schulz
from utils.training.state import TrainState
from utils.training.step import COMMUNICATION, EagerUpdate, Phase, clip_gradients, micro_step

BUCKET_BYTES = 25 << 20  # of gradients sent together while the backward pass goes on

Gradients = list[torch.Tensor | None]  # of the trainable parameters; None: the parameter has none


def add_into(left: torch.Tensor | None, right: torch.Tensor | None) -> torch.Tensor | None:
    """Add `right` to `left` in place and return the sum. None counts as zeros; the sum of two None is None."""
    if left is None or right is None:
        there = right if left is None else left
        return None if there is None else there.add_(0.0)  # a zero turns -0.0 into 0.0
    return left.add_(right)


class Tree:
    """Sums of lanes that wait for their neighbour in the tree: at most one of each size, 1, 2, 4, ... lanes."""

    def __init__(self) -> None:
        self._sums: list[tuple[int, Gradients]] = []  # (number of lanes, their sum), in descending order

    def add(self, gradients: Gradients) -> None:
        """Add the gradients of the next lane, which are changed in place."""
        size = 1
        while self._sums and self._sums[-1][0] == size:
            _, left = self._sums.pop()
            gradients = [add_into(*pair) for pair in zip(left, gradients, strict=True)]
            size *= 2
        self._sums.append((size, gradients))

    def total(self) -> Gradients:
        """The sum of all lanes, after the last one was added."""
        ((_, gradients),) = self._sums
        return gradients

    def with_last(self, index: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """The sum of all lanes for one parameter, with its gradient in the last lane, which completes the tree."""
        for _, left in reversed(self._sums):
            gradient = add_into(left[index], gradient)
        return gradient


def tree_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum, (), of L numbers, (L,), in the order of the tree; L is a power of two."""
    while len(values) > 1:
        values = values[0::2] + values[1::2]
    return values[0]


def lane_seed(seed: int, step: int, number: int) -> int:
    """The seed for the random numbers of one micro-step of an update; `number` counts micro-steps over all lanes."""
    digest = hashlib.blake2b(f"{seed}/{step}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Bucket:
    """Gradients of some parameters, one after the other in a flat tensor.

    Args:
        parameters: the parameters by their index.
    """

    def __init__(self, parameters: dict[int, torch.nn.Parameter]) -> None:
        sizes = [parameter.numel() for parameter in parameters.values()]
        first = next(iter(parameters.values()))
        self.flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        parts = self.flat.split(sizes)
        self.views = {
            index: part.view_as(parameter) for (index, parameter), part in zip(parameters.items(), parts, strict=True)
        }
        self.missing = set(parameters)
        self.work: Work | None = None
        self.level = 0  # the level of the tree that `work` adds


class GradientSum:
    """Adds the gradients of all ranks in buckets, which are sent while the backward pass computes the next ones.

    Args:
        exact: add pairs of ranks in the order of the tree; otherwise by one sum over all ranks.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], ranks: Ranks, *, exact: bool) -> None:
        self.parameters, self.ranks = list(parameters), ranks
        self._levels: list[int | None] = [*range(ranks.world_size.bit_length() - 1)] if exact else [None]
        self._tree: Tree | None = None  # set during the last backward pass of this rank
        self._has = torch.zeros(len(self.parameters))  # 1 for each parameter with a gradient; `finish` sums over ranks
        self.buckets: list[Bucket] = []
        self._bucket_of: dict[int, Bucket] = {}
        self._make_buckets()
        self._started = 0
        for index, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(lambda p, index=index: self._computed(index, p))

    @property
    def message_bytes(self) -> int:
        """Bytes that a rank sends in one update; it receives as many."""
        total = sum(bucket.flat.nbytes for bucket in self.buckets)
        if self._levels == [None]:  # a ring: all but one rank's share, twice
            return 2 * total * (self.ranks.world_size - 1) // self.ranks.world_size
        return total * len(self._levels)

    def _make_buckets(self) -> None:
        """Fill buckets in reverse order of the parameters, roughly that of the backward pass; each has one dtype."""
        members: dict[int, torch.nn.Parameter] = {}
        size = 0
        for index, parameter in reversed(list(enumerate(self.parameters))):
            last = next(reversed(members.values()), parameter)
            if members and (
                size + parameter.nbytes > BUCKET_BYTES
                or (last.dtype, last.device) != (parameter.dtype, parameter.device)
            ):
                self._add_bucket(members)
                members, size = {}, 0
            members[index] = parameter
            size += parameter.nbytes
        if members:
            self._add_bucket(members)

    def _add_bucket(self, members: dict[int, torch.nn.Parameter]) -> None:
        self.buckets.append(Bucket(members))
        self._bucket_of |= dict.fromkeys(members, self.buckets[-1])

    def begin(self, tree: Tree) -> None:
        """Begin the last backward pass of this rank; `tree` has the sums of its other lanes."""
        self._tree, self._started = tree, 0
        self._has.zero_()
        for bucket in self.buckets:
            bucket.missing, bucket.work, bucket.level = set(bucket.views), None, 0

    def _computed(self, index: int, parameter: torch.Tensor) -> None:
        if self._tree is not None:
            self._store(index, self._tree.with_last(index, parameter.grad))

    def _store(self, index: int, gradient: torch.Tensor | None) -> None:
        """Store the gradient of this rank's lanes and send the complete buckets, in the same order on all ranks."""
        bucket = self._bucket_of[index]
        if gradient is None:
            bucket.views[index].zero_()
        else:
            bucket.views[index].copy_(gradient)
            self._has[index] = 1.0
        bucket.missing.discard(index)
        while self._started < len(self.buckets) and not self.buckets[self._started].missing:
            ready = self.buckets[self._started]
            ready.work = self.ranks.start_sum(ready.flat, self._levels[0])
            self._started += 1
        if "nccl" not in self.ranks.backend:  # NCCL needs one order of all sums, even in different groups
            self._advance()

    def _advance(self) -> None:
        """Start the next level of each bucket whose sum is done; no bucket overtakes the one before it."""
        highest = len(self._levels) - 1
        for bucket in self.buckets[: self._started]:
            while bucket.level < highest and bucket.work is not None and bucket.work.is_completed():
                self._start_next_level(bucket)
            highest = bucket.level

    def _start_next_level(self, bucket: Bucket) -> None:
        """Wait for the sum of a bucket's level, then start that of its next level."""
        assert bucket.work is not None
        self.ranks.wait(bucket.work)
        bucket.level += 1
        bucket.work = self.ranks.start_sum(bucket.flat, self._levels[bucket.level])

    def finish(self) -> None:
        """Wait for the sums and make them the gradients of the parameters."""
        assert self._tree is not None
        for bucket in self.buckets:
            for index in sorted(bucket.missing, reverse=True):  # no gradient in the last lane
                self._store(index, self._tree.with_last(index, None))
        self._tree = None
        has = self.ranks.start_sum(self._has, None)
        for level in range(1, len(self._levels)):
            for bucket in self.buckets:
                if bucket.level < level:
                    self._start_next_level(bucket)
        for bucket in self.buckets:
            assert bucket.work is not None
            self.ranks.wait(bucket.work)
        self.ranks.wait(has)
        for bucket in self.buckets:
            for index, view in bucket.views.items():
                self.parameters[index].grad = view if self._has[index] else None


class LaneUpdate(EagerUpdate):
    """An update in lanes. Without the setting `lanes`, each rank has one lane, and they are added in any order.

    Random numbers are a function of seed, step, lane and micro-step. So they do not depend on the number of ranks, and
    a resume has no random stream to restore.
    """

    def __init__(self, state: TrainState) -> None:
        super().__init__(state)
        ranks, settings = state.ranks, state.config.train
        self.lanes, self._exact = settings.lanes or ranks.world_size, settings.lanes is not None
        self._in_lane = max(1, settings.gradient_accumulation_steps // self.lanes)
        self._own = range(
            ranks.rank * self.lanes // ranks.world_size, (ranks.rank + 1) * self.lanes // ranks.world_size
        )
        self.parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
        self.sum = GradientSum(self.parameters, ranks, exact=self._exact) if ranks.several else None
        if isinstance(state.optimizer, Muon):
            state.optimizer.orthogonalize = self._orthogonalize

    @property
    def message_bytes(self) -> int:
        return 0 if self.sum is None else self.sum.message_bytes

    def gradients(self, phase: Phase) -> tuple[torch.Tensor, torch.Tensor]:
        losses, tree = torch.zeros(self.lanes, device=self.state.device), Tree()
        for lane in self._own:
            is_last = lane == self._own[-1]
            losses[lane] = self._lane(lane, tree if is_last else None, phase)
            if not is_last:
                tree.add([parameter.grad for parameter in self.parameters])
                for parameter in self.parameters:
                    parameter.grad = None
        if self.sum is not None:
            with phase(COMMUNICATION):
                self.sum.finish()
                self.state.ranks.sum_exactly(losses)
        else:
            with phase("backward"):
                for index, parameter in enumerate(self.parameters):
                    parameter.grad = tree.with_last(index, parameter.grad)
        with phase("optimizer"):
            return tree_sum(losses) if self._exact else losses.sum(), clip_gradients(self.state)

    def _lane(self, lane: int, last: Tree | None, phase: Phase) -> torch.Tensor:
        """Compute the gradients of a lane; return its part of the loss, ().

        Args:
            last: if this is the last lane of this rank, the sums of its other lanes.
        """
        state, micro_steps = self.state, self.lanes * self._in_lane
        total = torch.zeros((), device=state.device)
        end = (lane + 1) * self._in_lane
        first_of_next = micro_steps + self._own.start * self._in_lane  # this rank's first micro-step of the next update
        for number in range(lane * self._in_lane, end):
            torch.manual_seed(lane_seed(state.config.train.seed, state.step, number))
            if last is not None and self.sum is not None and number == end - 1:
                self.sum.begin(last)
            following = number + 1 if number + 1 < self._own.stop * self._in_lane else first_of_next
            total += micro_step(state, number, micro_steps, state.step * micro_steps + following, phase)
        return total

    def _orthogonalize(self, matrices: torch.Tensor) -> torch.Tensor:
        """`newton_schulz` of the matrices, (N, rows, columns), an equal part of which belongs to each lane.

        A rank computes the parts of its lanes, so the matrix products have the same shapes for any number of ranks.
        """
        ranks = self.state.ranks
        size = -(-len(matrices) // self.lanes)
        parts = matrices.split(size)[self._own.start : self._own.stop]
        own = [newton_schulz(part) for part in parts]
        if not ranks.several:
            return torch.cat(own)
        room = torch.zeros((size * len(self._own), *matrices.shape[1:]), device=matrices.device)
        if own:
            done = torch.cat(own)
            room[: len(done)] = done
        return torch.cat(ranks.gather(room))[: len(matrices)]
